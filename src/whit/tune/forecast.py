"""The memory that `whit tune` will need, from the plan of the file that it trains: no weight is read.

Three moments decide: the whole original giving gradients back, before blocks are trained, with the hidden states of all
windows twice; one block that is trained; and the whole model trained from end to end, when the blocks of the original
are gone. What a window leaves behind in a block for its gradients was counted on blocks of several shapes, with
products in bfloat16 (docs/memory.md); elsewhere it is nearly twice that.
"""

from __future__ import annotations

import math

from whit.grids.floats import Float
from whit.models.model import Model
from whit.pipeline.counts import HEADS, split
from whit.pipeline.plan import Plan, Step
from whit.shape import Shape, shape_from_config
from whit.tune.train import Tuning

BEGUN = 650e6  # bytes of a process that has quantized the file and written text
KERNELS = 850e6  # that oneDNN keeps, one for every number of tokens that an expert was given
FLOAT, HALF = 4, 2  # bytes
CODE = 2  # bytes per weight of codes: those of the start, and those that there are now
SCALE = 12  # bytes per scale or minimum: as stored, its change, and copies of it
RESIDUAL, GATED = 24, 6  # bytes that a token leaves behind in a block: per column of hidden states, per gated input
TRAINED, LATER = 40, 12  # bytes per weight that is trained: offset, gradients, Adam; without offset, from end to end


def ram_bytes(model: Model, plan: Plan, tuning: Tuning, windows: int, length: int, followed: bool = True) -> float:
    """Peak resident bytes of `whit tune` on a file that the plan is of, training alone.

    windows   of `length` tokens, copies and those to decide on included
    followed  whether there is an original to follow
    """
    by_blocks, end = _peaks(model, plan, tuning, windows, length, followed)
    decoded = FLOAT * _n_trained(plan)  # for the first look at other text; the C library keeps it for what comes
    kernels = KERNELS if any(len(step.tensor.shape) == 3 for step in plan.steps) else 0.0
    return BEGUN + kernels + max(by_blocks + decoded if followed else 0.0, end)


def device_bytes(model: Model, plan: Plan, tuning: Tuning, windows: int, length: int, followed: bool = True) -> float:
    """The same without what the process takes and keeps: what lies on the device that computes."""
    return max(_peaks(model, plan, tuning, windows, length, followed))


def _peaks(model: Model, plan: Plan, tuning: Tuning, windows: int, length: int, followed: bool) -> tuple[float, float]:
    """While there are two models, and from end to end."""
    shape, (blocks, outer) = shape_from_config(model.config), split(plan.steps)
    trained = _n_trained(plan)
    student = FLOAT * plan.n_weights + CODE * trained + SCALE * sum(map(_n_scales, filter(_on_grid, plan.steps)))
    head = next(step for name in HEADS for step in outer if step.tensor.name == name)
    quick = HALF * head.tensor.n_weights  # the head in bfloat16, where it is not trained
    heads = (0 if _on_grid(head) else quick) + (quick if followed else 0)
    hidden = FLOAT * windows * length * shape.hidden
    left = [_left_behind(steps, shape, length, tuning.checkpoints) for steps in blocks.values()]
    end = student + heads + LATER * trained + tuning.at_once * (sum(left) + max(left))
    if not followed:
        return 0.0, float(end)
    outside = FLOAT * sum(step.tensor.n_weights for step in outer)
    reading = student + FLOAT * plan.n_weights + heads + hidden
    if not tuning.by_blocks(True):
        return float(reading), float(end + outside + hidden)
    metrics = FLOAT * len(blocks) * shape.hidden**2
    block = max(sum(step.tensor.n_weights for step in steps) for steps in blocks.values())
    whole = sum(_left_behind(steps, shape, length, False) for steps in blocks.values())
    learning = reading + hidden + metrics + max(whole, TRAINED * block + tuning.block_batch * max(left))
    return float(learning), float(end + outside + hidden)


def _n_trained(plan: Plan) -> int:
    return sum(step.tensor.n_weights for step in plan.steps if _on_grid(step))


def _on_grid(step: Step) -> bool:
    return not isinstance(step.grid, Float) and len(step.tensor.shape) > 1


def _n_scales(step: Step) -> int:
    """Scales and minima of a tensor."""
    rows, cols = step.tensor.n_weights // step.tensor.shape[-1], step.tensor.shape[-1]
    return sum(math.prod(each.shape) for each in step.grid.schema((rows, cols)).values())


def _left_behind(steps: list[Step], shape: Shape, length: int, checkpoints: bool) -> float:
    """Bytes that one window leaves behind in a block, to be derived; its own hidden states where it is run twice."""
    if checkpoints:
        return FLOAT * length * shape.hidden
    weights = sum(step.tensor.n_weights for step in steps)
    return length * (RESIDUAL * shape.hidden + GATED * shape.intermediate) + weights
