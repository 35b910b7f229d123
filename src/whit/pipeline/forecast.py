"""The memory that a job will need, from its plan: no weight is read.

One of four moments decides: the widest block with the second moments of its inputs; the largest matrix outside the
blocks; the whole model in bfloat16 when it writes its own text; and in float32 when the verdict runs it.
The factors were measured (docs/memory.md), peak resident memory of the process itself. Helper processes share most of
their memory with it and are not counted.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from whit.errors import RecipeError
from whit.memory import kv_cache_bytes, shape_from_config
from whit.models.model import Model
from whit.pipeline.counts import Text
from whit.pipeline.effort import Calibration
from whit.pipeline.plan import Plan, Step

PLAIN, CALIBRATED = 280e6, 465e6  # bytes with all imports; the second with transformers and a tokenizer
VERDICT = 680e6  # the same with logits of two models compared
BLOCK = 16  # bytes per weight of a block: filled, read, rounded, codes
MOMENT, FACTOR = 8, 40  # bytes per entry of each input's second moments, and while the widest is factored
OUTER = {"gguf": 11, "folder": 16}  # bytes per weight of the largest matrix outside; folders join its pieces
WINDOW = 512  # tokens


def needs_text(plan: Plan) -> bool:
    """Whether anything is rounded for what arrives at a layer."""
    return any(step.needs_moments for step in plan.steps)


def ram_bytes(model: Model, plan: Plan, text: Text, looked: int | None) -> float:
    """Peak resident bytes of `whit quantize` with the plan.

    text    what is calibrated on
    looked  windows that the verdict reads, None for no verdict
    """
    largest = max(step.tensor.n_weights for step in plan.steps)
    peaks = [rounding_bytes(model, plan, text.windows)]
    if needs_text(plan) and text.sampled:  # the whole model writes, keys and values of all texts beside it
        shape, n = shape_from_config(model.config), max(text.sampled)
        peaks.append(
            CALIBRATED + 2 * (plan.n_weights + largest) + kv_cache_bytes(shape, text.length, n) + 12 * n * shape.vocab
        )
    if looked:
        peaks.append(VERDICT + 4.0 * (plan.n_weights + largest))
    return max(peaks)


def rounding_bytes(model: Model, plan: Plan, windows: float) -> float:
    """Peak resident bytes of rounding alone. windows: of 512 tokens, whose hidden states are in memory."""
    if not needs_text(plan):
        decoded = bool(model.gguf_metadata or model.quantization)
        largest = max(math.prod(part.shape) for step in plan.steps for part in step.tensor.parts)
        copied = max((step.n_bytes for step in plan.steps if step.stored is not None), default=0)  # all at once
        return PLAIN + max((8 if decoded else 4) * largest, copied)
    blocks: dict[str, list[tuple[int, ...]]] = {}
    outer = 0
    for step in plan.steps:
        found = re.match(r"blk\.\d+\.", step.tensor.name)
        if found:
            blocks.setdefault(found[0], []).append(step.tensor.shape)
        else:
            outer = max(outer, step.tensor.n_weights)
    hidden = next(step.tensor.shape[-1] for step in plan.steps if step.tensor.name == "token_embd.weight")
    ends = OUTER["gguf" if plan.recipe.layout == "gguf" else "folder"] * outer
    return CALIBRATED + 4.0 * windows * WINDOW * hidden + max(ends, *map(_block_bytes, blocks.values()))


def must_spill(model: Model, plan: Plan, windows: float, ram: int | None) -> bool:
    """Whether hidden states must go to disk for a job to stay within `ram` bytes (None: no limit).

    windows  calibration windows of 512 tokens
    Raises RecipeError when even that is not enough, with what is.
    """
    if ram is None:
        return False
    least = rounding_bytes(model, plan, 0)
    if least > ram:
        raise RecipeError(
            f"--ram {ram / 1e6:,.0f} MB cannot be kept: this job takes about {least / 1e6:,.0f} MB at least, "
            + (
                "with hidden states on disk. --rounding nearest takes less."
                if needs_text(plan)
                else "for its largest tensor."
            )
        )
    return rounding_bytes(model, plan, windows) > ram


def within(model: Model, plan: Plan, calibration: Calibration, folder: Path) -> Calibration:
    """The calibration of a run that keeps to its `ram`: with a folder to spill to where it must. Raises RecipeError."""
    windows = calibration.windows.numel() / WINDOW * (2 if calibration.strength > 0 else 1)
    return replace(calibration, spill=folder if must_spill(model, plan, windows, calibration.ram) else None)


def state_bytes(plan: Plan, windows: int) -> float:
    """Bytes that an unfinished job keeps beside its output at most (docs/scale.md); 0 for one that needs no text.

    Codes and parameters of all blocks, and for a moment twice the hidden states.
    """
    if not needs_text(plan):
        return 0.0
    hidden = next(step.tensor.shape[-1] for step in plan.steps if step.tensor.name == "token_embd.weight")
    blocks = [step for step in plan.steps if step.tensor.name.startswith("blk.")]
    fisher = sum(2 * step.tensor.n_weights for step in blocks if step.needs_fisher)
    return sum(map(_kept_bytes, blocks)) + 2 * 4.0 * windows * WINDOW * hidden + fisher


def _kept_bytes(step: Step) -> int:
    """Codes and parameters of a tensor as they are in memory."""
    if step.stored is not None:
        return step.n_bytes
    shape = step.tensor.n_weights // step.tensor.shape[-1], step.tensor.shape[-1]
    parts = [step.grid.code_spec(shape), *step.grid.schema(shape).values()]
    return sum(math.prod(each.shape) * each.dtype.itemsize for each in parts)


def _block_bytes(shapes: list[tuple[int, ...]]) -> float:
    """While a block is rounded. Matrices of equal width often share what arrives: four moments at most."""
    matrices = [shape for shape in shapes if len(shape) > 1]
    entries = sorted((shape[-1] ** 2 * (math.prod(shape[:-2])) for shape in matrices), reverse=True)[:4]
    widest = max((shape[-1] for shape in matrices), default=0)
    return BLOCK * sum(map(math.prod, shapes)) + MOMENT * sum(entries) + FACTOR * widest**2
