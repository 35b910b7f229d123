"""The memory that a job will need, from its plan: no weight is read.

Two moments decide: the widest block with the second moments of its inputs, or the largest matrix outside the blocks.
The factors were measured (docs/memory.md), peak resident memory of the process itself. Helper processes share most of
their memory with it and are not counted.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from whit.errors import RecipeError
from whit.models.model import Model
from whit.pipeline.effort import Calibration
from whit.pipeline.plan import Plan

PLAIN, CALIBRATED = 280e6, 465e6  # bytes with all imports; the second with transformers and a tokenizer
BLOCK = 16  # bytes per weight of a block: filled, read, rounded, codes
MOMENT, FACTOR = 8, 40  # bytes per entry of each input's second moments, and while the widest is factored
OUTER = {"gguf": 11, "folder": 16}  # bytes per weight of the largest matrix outside; folders join its pieces
WINDOW = 512  # tokens


def needs_text(plan: Plan) -> bool:
    """Whether anything is rounded for what arrives at a layer."""
    return any(step.needs_moments for step in plan.steps)


def ram_bytes(model: Model, plan: Plan, windows: float) -> float:
    """Peak resident bytes of `write_model` with the plan.

    windows  calibration windows of 512 tokens
    """
    if not needs_text(plan):
        decoded = bool(model.gguf_metadata or model.quantization)
        largest = max(math.prod(part.shape) for step in plan.steps for part in step.tensor.parts)
        return PLAIN + (8 if decoded else 4) * largest
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
    least = ram_bytes(model, plan, 0)
    if least > ram:
        raise RecipeError(
            f"--ram {ram / 1e6:,.0f} MB cannot be kept: this job takes about {least / 1e6:,.0f} MB at least, "
            + (
                "with hidden states on disk. --rounding nearest takes less."
                if needs_text(plan)
                else "for its largest tensor."
            )
        )
    return ram_bytes(model, plan, windows) > ram


def within(model: Model, plan: Plan, calibration: Calibration, folder: Path) -> Calibration:
    """The calibration of a run that keeps to its `ram`: with a folder to spill to where it must. Raises RecipeError."""
    windows = calibration.windows.numel() / WINDOW * (2 if calibration.strength > 0 else 1)
    return replace(calibration, spill=folder if must_spill(model, plan, windows, calibration.ram) else None)


def _block_bytes(shapes: list[tuple[int, ...]]) -> float:
    """While a block is rounded. Matrices of equal width often share what arrives: four moments at most."""
    matrices = [shape for shape in shapes if len(shape) > 1]
    entries = sorted((shape[-1] ** 2 * (math.prod(shape[:-2])) for shape in matrices), reverse=True)[:4]
    widest = max((shape[-1] for shape in matrices), default=0)
    return BLOCK * sum(map(math.prod, shapes)) + MOMENT * sum(entries) + FACTOR * widest**2
