"""The memory that a job will need, from its plan: no weight is read.

One of four moments decides: the widest block with the second moments of its inputs; the largest matrix outside the
blocks; the whole model in bfloat16 when it writes its own text; and in float32 when the verdict runs it.
The factors were measured (docs/memory.md), peak resident memory of the process itself. Helper processes share most of
their memory with it and are not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from whit.errors import RecipeError
from whit.memory import kv_cache_bytes
from whit.models.model import Model
from whit.pipeline.counts import Text
from whit.pipeline.effort import Calibration
from whit.pipeline.plain import AHEAD
from whit.pipeline.plan import Plan, Step
from whit.pipeline.rounder import BATCH
from whit.shape import shape_from_config

PLAIN, CALIBRATED = 290e6, 465e6  # bytes with all imports; the second with transformers and a tokenizer
VERDICT = 680e6  # the same with logits of two models compared
BLOCK = 16  # bytes per weight of a block: filled, read, rounded, codes
MOMENT, FACTOR = 8, 40  # bytes per entry of each input's second moments, and while the widest is factored
EXPERT, CURVED = 8, 16  # more of them where experts have moments each: backed by others; factored, also rescaled
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes per weight as read from a file; all else is decoded, with a copy
REREAD = 9  # bytes per weight of the largest tensor: its bytes, its values in pieces and together
DECODED, WHOLE = 8, 16  # bytes per weight then, and where rows cannot be rounded some at a time
OUTER = {"gguf": 11, "folder": 16}  # bytes per weight of the largest matrix outside; folders join its pieces
WINDOW = 512  # tokens
DOWN = "_down_"
HELD = "for its largest tensors."


def needs_text(plan: Plan) -> bool:
    """Whether anything is rounded for what arrives at a layer."""
    return any(step.needs_moments for step in plan.steps)


def ram_bytes(model: Model, plan: Plan, text: Text, looked: int | None, limit: int | None = None) -> float:
    """Peak resident bytes of `whit quantize` with the plan.

    text    what is calibrated on
    looked  windows that the verdict reads, None for no verdict
    limit   of --ram: hidden states are on disk where they must be
    """
    windows = text.windows if limit is None or rounding_bytes(model, plan, text.windows) <= limit else 0
    peaks = [rounding_bytes(model, plan, windows), writing_bytes(model, plan, text)]
    if looked is not None:
        peaks.append(rereading_bytes(plan))
    return max(*peaks, verdict_bytes([step.tensor.n_weights for step in plan.steps]) if looked else 0)


def writing_bytes(model: Model, plan: Plan, text: Text) -> float:
    """Peak resident bytes while the whole model writes text, keys and values of all texts beside it; 0 for none."""
    if not (needs_text(plan) and text.sampled):
        return 0.0
    largest = max(step.tensor.n_weights for step in plan.steps)
    shape, n = shape_from_config(model.config), max(text.sampled)
    return CALIBRATED + 2 * (plan.n_weights + largest) + kv_cache_bytes(shape, text.length, n) + 12 * n * shape.vocab


def rereading_bytes(plan: Plan) -> float:
    """Peak resident bytes while what was written is read again, tensor by tensor."""
    return (CALIBRATED if needs_text(plan) else PLAIN) + REREAD * max(step.tensor.n_weights for step in plan.steps)


def verdict_bytes(n_weights: Sequence[int]) -> float:
    """Peak resident bytes while the verdict runs a model. n_weights: of each tensor."""
    return VERDICT + 4.0 * (sum(n_weights) + max(n_weights))


def rounding_bytes(model: Model, plan: Plan, windows: float) -> float:
    """Peak resident bytes of rounding alone. windows: of 512 tokens, whose hidden states are in memory."""
    if not needs_text(plan):
        return PLAIN + _plain_bytes(model, plan)
    blocks: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    outer = 0
    for step in plan.steps:
        found = re.match(r"blk\.\d+\.", step.tensor.name)
        if found:
            blocks.setdefault(found[0], []).append((step.tensor.name, step.tensor.shape))
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
        how = "with hidden states on disk. --rounding nearest takes less." if needs_text(plan) else HELD
        raise RecipeError(
            f"--ram {ram / 1e6:,.0f} MB cannot be kept: this job takes about {least / 1e6:,.0f} MB at least, {how}"
        )
    return rounding_bytes(model, plan, windows) > ram


def check_ram(model: Model, plan: Plan, text: Text, verify: bool, ram: int) -> None:
    """Raise RecipeError when a job cannot stay within `ram` bytes, whatever goes to disk; with what could.

    verify  whether what was written is read again
    """
    must_spill(model, plan, text.windows, ram)
    if verify and (needed := rereading_bytes(plan)) > ram:
        raise RecipeError(
            f"--ram {ram / 1e6:,.0f} MB cannot be kept: reading the result again takes about {needed / 1e6:,.0f} MB. "
            "--no-verify leaves it out."
        )
    if (needed := writing_bytes(model, plan, text)) > ram:
        raise RecipeError(
            f"--ram {ram / 1e6:,.0f} MB cannot be kept: the whole model writes a part of the text, which takes about "
            f"{needed / 1e6:,.0f} MB. Give a text with --calib; `docs` is one that is there."
        )


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


def _plain_bytes(model: Model, plan: Plan) -> float:
    """What is read, as it is stored, and what is read ahead meanwhile."""
    width, held = _width(model), list[tuple[int, float]]()  # weights of a part, and its bytes
    for step in plan.steps:
        if step.stored is not None:  # all at once
            held.append((step.tensor.n_weights, step.n_bytes))
            continue
        for n in (math.prod(part.shape) for part in step.tensor.parts):
            held.append((n, n * (width if step.grid.row_independent else width + WHOLE)))
    ahead = [n_bytes if n <= AHEAD else 0.0 for n, n_bytes in held[1:]]
    return max(now + coming for (_, now), coming in zip(held, [*ahead, 0.0], strict=True))


def _width(model: Model) -> int:
    """Bytes per weight while a tensor is read: by its type in the file that most of the weights have."""
    source = model.gguf_tensors or model.tensors
    kinds: dict[str, int] = {}
    for info in map(source.info, source.names()):
        kinds[info.dtype] = kinds.get(info.dtype, 0) + math.prod(info.shape)
    moved = model.quantization or (
        model.gguf_metadata and model.gguf_tensors is None
    )  # read, and read in another order
    return DECODED if moved else FLOATS.get(max(kinds, key=lambda kind: kinds[kind]), DECODED)


Shapes = Sequence[tuple[str, tuple[int, ...]]]  # of tensors, by name


@dataclass(frozen=True)
class Experts:
    """What arrives at n matrices [rows, cols] of a layer's experts. alone: at no others."""

    n: int
    rows: int
    cols: int
    alone: bool

    @property
    def entries(self) -> int:
        """Of their second moments."""
        return self.n * self.cols**2


def inputs_of(shapes: Shapes) -> tuple[list[int], list[Experts]]:
    """Inputs of a block that have second moments: columns of each, and those of experts.

    Matrices of equal width often share what arrives: four at most, and two of experts, of which `down` has its own.
    """
    plain = sorted((shape[-1] for _, shape in shapes if len(shape) == 2), reverse=True)[:4]
    experts = {(shape[-1], DOWN in name): shape for name, shape in shapes if len(shape) == 3}
    return plain, [Experts(*shape, alone) for (_, alone), shape in experts.items()]


def _block_bytes(shapes: Shapes) -> float:
    """While a block is rounded."""
    plain, experts = inputs_of(shapes)
    pooled = sum(each.entries for each in experts)
    # what is factored is dropped with the batch, but where another tensor reads the same
    curved = sum(
        (min(each.n, 1 + BATCH // (each.rows * each.cols)) if each.alone else each.n) * each.cols**2 for each in experts
    )
    entries = sum(cols**2 for cols in plain) + pooled
    widest = max((shape[-1] for _, shape in shapes if len(shape) > 1), default=0)
    weights = sum(math.prod(shape) for _, shape in shapes)
    return BLOCK * weights + MOMENT * entries + EXPERT * pooled + CURVED * curved + FACTOR * widest**2
