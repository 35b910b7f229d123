"""One tensor of a plan, rounded for the inputs that arrive at it: the same whether these were just gathered or read
from an importance matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from whit.calibration.moments import Moments, target_shift
from whit.grids.grid import Adaptive
from whit.grids.quantized import QuantizedTensor
from whit.pipeline.effort import TensorLoss
from whit.pipeline.plain import check_finite, too_large
from whit.pipeline.plan import Step
from whit.rounding.curvature import Curvature, curvature
from whit.rounding.methods import METHODS, Effort
from whit.rounding.nearest import nearest
from whit.rounding.polish import loss


class Rounder:
    """Rounds matrices and remembers what each lost.

    losses  one entry per matrix, in the order of rounding
    """

    def __init__(self, effort: Effort, strength: float = 0.0) -> None:
        """strength  how much of the earlier layers' errors each target makes up for, 0 for none, 1 for all."""
        self._effort, self._strength = effort, strength
        self._curved: dict[Moments, Curvature] = {}  # by identity
        self._shifts: dict[Moments, Tensor] = {}
        self.losses: list[TensorLoss] = []

    def forget(self) -> None:
        """Drop factors of moments that will not come again."""
        self._curved.clear()
        self._shifts.clear()

    def pieces(
        self, step: Step, moments: Sequence[Moments | None], factors: Tensor | None = None
    ) -> Iterator[QuantizedTensor]:
        """The matrices of one tensor in order: the whole, or one per expert.

        moments  one entry per matrix; None where nothing is known of its inputs
        factors  [cols] float32 that the columns are multiplied with; moments are those before it
        Raises BadWeightsError for weights or moments that are not finite.
        """
        for W, seen in zip(self._matrices(step), moments, strict=True):
            yield self._one(step, W, seen, factors)

    def _matrices(self, step: Step) -> Iterator[Tensor]:
        """The matrices [rows, cols] float32 that have a tap each: the tensor, or one per expert."""
        for part in step.tensor.parts if len(step.tensor.shape) == 3 else [None]:
            W = part.read() if part else torch.cat([piece.read() for piece in step.tensor.parts])
            for matrix in W.unbind(0) if W.dim() == 3 else [W]:
                check_finite(step.tensor, matrix, W)
                yield matrix.float()

    def _one(self, step: Step, W: Tensor, moments: Moments | None, factors: Tensor | None) -> QuantizedTensor:
        grid = cast(Adaptive, step.kind.grid)
        if moments is None or moments.is_empty:
            c = curvature(torch.zeros(W.shape[1], W.shape[1]))
            inside = step.tensor.name.startswith("blk.")
            note = "no calibration token came here" if inside else "an embedding: all columns count the same"
        else:
            moments.check(step.tensor.name)
            c = self.curvature_of(moments)
            note = "; ".join(each for each in (moments.note, c.note) if each)
            if moments.C is not None and self._strength:
                W = torch.addmm(W, W, self._shift(moments, moments.C), alpha=self._strength)
        if factors is not None:
            W, c = W * factors, c.rescaled(factors)
        try:
            quantized = METHODS[step.rounding](W, grid, c, self._effort)
            plain = nearest(W, grid)
        except OverflowError as error:
            raise too_large(step, error) from None
        after, before = (loss(W, each.dequantize(), c.H).sum().item() for each in (quantized, plain))
        counts = (moments.n_tokens, moments.n_lost, moments.n_dead) if moments else (0, 0, 0)
        name, kind = step.tensor.name, step.kind.name
        self.losses.append(TensorLoss(name, kind, step.rounding, after, before, *counts, note))
        return quantized

    def curvature_of(self, moments: Moments) -> Curvature:
        """Factored once for all weights that share a tap."""
        if moments not in self._curved:
            self._curved[moments] = curvature(moments.H, self._effort.damping)
        return self._curved[moments]

    def _shift(self, moments: Moments, C: Tensor) -> Tensor:
        """As above."""
        if moments not in self._shifts:
            self._shifts[moments] = target_shift(moments.H, C, self._effort.damping)
        return self._shifts[moments]
