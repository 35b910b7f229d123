"""Roundings that need no calibration: one tensor after the other, in slices of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from whit.errors import BadWeightsError
from whit.models.architecture import GGUFTensor
from whit.pipeline.plan import Step
from whit.rounding.nearest import rounding_named, slices


def plain_bytes(step: Step) -> Iterator[Tensor]:
    """The bytes of one tensor: one part per expert, each in slices of rows, because GGML's blocks never span rows.

    Raises BadWeightsError for weights that are not finite or that the type cannot hold.
    """
    if step.stored is not None:
        yield step.stored()
        return
    rounding = rounding_named(step.rounding)
    for part in step.tensor.parts:
        W = part.read()
        W = W.reshape(-1, W.shape[-1])  # [rows, cols]
        for rows in slices(W):
            check_finite(step.tensor, rows, W)
            try:
                yield step.kind.pack(rounding(rows.float(), step.kind.grid))
            except OverflowError as error:
                raise too_large(step, error) from None


def too_large(step: Step, error: OverflowError) -> BadWeightsError:
    """The message for a scale that the type cannot hold."""
    return BadWeightsError(
        f"{step.tensor.name}: {error}, so {step.kind.name} cannot hold it. Use bf16 or f32 for this tensor."
    )


def check_finite(tensor: GGUFTensor, rows: Tensor, W: Tensor) -> None:
    """Raise BadWeightsError when `rows` of W hold NaN or infinities; the message counts those in all of W."""
    low, high = rows.aminmax()  # one pass; NaN comes through
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        count = int((~torch.isfinite(W)).sum())
        raise BadWeightsError(
            f"{tensor.name}: {count} of {W.numel()} weights are NaN or infinite. The model is damaged; get it again."
        )
