"""Matrices rounded for the inputs that arrive at them: the same whether these were just gathered or read from an
importance matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from whit.calibration.moments import Moments, target_shift
from whit.grids.grid import Adaptive
from whit.grids.quantized import QuantizedTensor
from whit.pipeline.effort import TensorLoss
from whit.pipeline.plain import check_finite, too_large
from whit.pipeline.plan import Step
from whit.ranks import ALONE, Ranks
from whit.rounding.curvature import Curvature, curvature
from whit.rounding.methods import Effort, rounded

ROWS = 1024  # rounded at a time, by one core
CODES, AFTER, BEFORE, NOTE = "codes", "loss", "plain loss", "note"  # beside the parameters of the grid
BATCH = 1 << 26  # weights read before they are spread over the cores


@dataclass(frozen=True)
class Task:
    """A tensor to round.

    moments  one entry per matrix, the whole or one per expert; None where nothing is known of its inputs
    factors  [cols] float32 that the columns are multiplied with; moments and fisher are those before it
    fisher   of the tensor's shape, where the rounding asks for it and it is known
    """

    step: Step
    moments: Sequence[Moments | None]
    factors: Tensor | None = None
    fisher: Tensor | None = None


@dataclass(frozen=True)
class _Piece:
    """Some rows of a matrix, and what arrives there; what follows from that is filled in where it is computed."""

    step: Step
    W: Tensor
    moments: Moments | None
    factors: Tensor | None
    F: Tensor | None
    c: Curvature | None = None
    shift: Tensor | None = None
    note: str = ""

    @property
    def cost(self) -> float:
        """About proportional to time: every column costs its calls, every weight its share of a matrix product."""
        rows, cols = self.W.shape
        return cols * (500.0 + rows * (1 + cols / 2000))


@dataclass(frozen=True)
class _Matrix:
    """Its pieces, and what the report will say."""

    pieces: list[_Piece]
    moments: Moments | None


class Rounder:
    """Rounds matrices and remembers what each lost.

    losses  one entry per matrix, in the order of rounding
    """

    def __init__(self, effort: Effort, strength: float = 0.0, ranks: Ranks = ALONE) -> None:
        """For a run.

        strength  how much of the earlier layers' errors each target makes up for, 0 for none, 1 for all
        ranks     who shares the work; all of them ask for the same matrices, and get them
        """
        self._effort, self._strength, self.ranks = effort, strength, ranks
        self._curved: dict[Moments, Curvature] = {}  # by identity
        self._plain: dict[int, Curvature] = {}  # by width
        self._shifts: dict[tuple[int, int], tuple[Moments, Tensor | None, Tensor]] = {}  # by identity
        self._scaled: dict[tuple[int, int], tuple[Curvature, Tensor, Curvature]] = {}  # by identity of the first two
        self.losses: list[TensorLoss] = []

    def forget(self) -> None:
        """Drop factors of moments that will not come again."""
        self._curved.clear()
        self._plain.clear()
        self._shifts.clear()
        self._scaled.clear()

    def rounded(self, tasks: Iterable[Task]) -> Iterator[QuantizedTensor]:
        """The matrices of all tasks in order: one per entry of their moments.

        What was factored for some of them is dropped with the last: a layer's experts have a factor each.
        Raises BadWeightsError for weights or moments that are not finite, or too large for a scale.
        """
        tasks, batch = list(tasks), list[_Matrix]()
        left = Counter(moments for task in tasks for moments in task.moments)
        for task in tasks:
            n = len(task.moments)
            each = [None] * n if task.fisher is None else task.fisher.view(n, -1, task.fisher.shape[-1])
            for W, moments, F in zip(_matrices(task.step), task.moments, each, strict=True):
                batch.append(self._matrix(task, W, moments, F))
                if sum(piece.W.numel() for matrix in batch for piece in matrix.pieces) >= BATCH:
                    yield from self._spread(batch)
                    self._drop(batch, left)
                    batch = []
        yield from self._spread(batch)
        self._drop(batch, left)

    def _drop(self, batch: list[_Matrix], left: Counter[Moments | None]) -> None:
        """What nothing that is still to come needs. left: matrices to come by their moments."""
        for matrix in batch:
            left[matrix.moments] -= 1
            if matrix.moments is not None and not left[matrix.moments]:
                c, seen = self._curved.pop(matrix.moments, None), id(matrix.moments)
                self._scaled = {key: each for key, each in self._scaled.items() if each[0] is not c}
                self._shifts = {key: each for key, each in self._shifts.items() if key[0] != seen}

    def _matrix(self, task: Task, W: Tensor, moments: Moments | None, F: Tensor | None) -> _Matrix:
        if moments is not None and not moments.is_empty:
            moments.check(task.step.tensor.name)
        size = ROWS if task.step.grid.row_independent else W.shape[0]
        weights = [None] * -(-W.shape[0] // size) if F is None else F.split(size)
        pieces = zip(W.split(size), weights, strict=True)
        return _Matrix([_Piece(task.step, rows, moments, task.factors, F) for rows, F in pieces], moments)

    def _spread(self, batch: list[_Matrix]) -> Iterator[QuantizedTensor]:
        pieces = [piece for each in batch for piece in each.pieces]
        found = iter(self.ranks.spread(self._one, pieces, lambda piece: piece.cost, self._ready))
        for matrix in batch:
            parts = [next(found) for _ in matrix.pieces]
            notes = [part.pop(NOTE) for part in parts]  # the same on all
            together = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            codes, after, before = (together.pop(key) for key in (CODES, AFTER, BEFORE))
            seen, step = matrix.moments, matrix.pieces[0].step
            counts = (seen.n_tokens, seen.n_lost, seen.n_dead) if seen else (0, 0, 0)
            named, losses = (step.tensor.name, step.type, step.rounding), (after.sum().item(), before.sum().item())
            self.losses.append(TensorLoss(*named, *losses, *counts, bytes(notes[0].tolist()).decode()))
            shape = sum(piece.W.shape[0] for piece in matrix.pieces), matrix.pieces[0].W.shape[1]
            yield QuantizedTensor(step.grid, shape, codes, together)

    def _ready(self, piece: _Piece) -> _Piece:
        """With what many pieces share, which is found once."""
        moments, shift = piece.moments, None
        if moments is None or moments.is_empty:
            inside = piece.step.tensor.name.startswith("blk.")
            note = "no calibration token came here" if inside else "an embedding: all columns count the same"
            c = self._unknown(piece.W.shape[1])
        else:
            c = self.curvature_of(moments)
            note = "; ".join(each for each in (moments.note, c.note) if each)
            if moments.C is not None and self._strength:
                shift = self._shift(moments, moments.C, piece.factors)
        if piece.factors is not None:
            c = self._rescaled(c, piece.factors)
        return replace(piece, c=c, shift=shift, note=note)

    def _one(self, piece: _Piece) -> dict[str, Tensor]:
        """Codes and parameters of the rows, the loss of each, and that of plain rounding."""
        W, c, grid = piece.W, cast(Curvature, piece.c), cast(Adaptive, piece.step.grid)
        F = None if piece.F is None else piece.F.float()
        if piece.factors is not None:
            W = W * piece.factors
            F = None if F is None else F / piece.factors.square()  # gradients are divided by what weights grow by
        if piece.shift is not None:
            W = torch.addmm(W, W, piece.shift, alpha=self._strength)
        try:
            found, plain = rounded(piece.step.rounding, W, grid, c, self._effort, F)
        except OverflowError as error:
            raise too_large(piece.step, error) from None
        said = {AFTER: found.loss.double(), BEFORE: plain.loss.double()}
        said |= {NOTE: torch.tensor(list(piece.note.encode()), dtype=torch.uint8)}
        return {**found.quantized.params, CODES: found.quantized.codes, **said}

    def curvature_of(self, moments: Moments) -> Curvature:
        """Factored once for all weights that share a tap."""
        if moments not in self._curved:
            self._curved[moments] = curvature(moments.H, self._effort.damping)
        return self._curved[moments]

    def _unknown(self, cols: int) -> Curvature:
        """Where nothing is known all columns count the same."""
        if cols not in self._plain:
            self._plain[cols] = curvature(torch.zeros(cols, cols))
        return self._plain[cols]

    def _rescaled(self, c: Curvature, factors: Tensor) -> Curvature:
        """As above, for weights that share their factors too."""
        key = id(c), id(factors)
        if key not in self._scaled:
            self._scaled[key] = c, factors, c.rescaled(factors, self._effort.damping)
        return self._scaled[key][2]

    def _shift(self, moments: Moments, C: Tensor, factors: Tensor | None) -> Tensor:
        """As above. Damped in the scale of the factors, as the curvature is: what a column of small weights is moved by
        would otherwise be nothing to the loss, and large beside its neighbours once it is rescaled.
        """
        key = id(moments), id(factors)
        if key not in self._shifts:
            H = moments.H
            if factors is not None:
                t = factors.double()
                H, C = H / t[:, None] / t, C / t[:, None] / t
            self._shifts[key] = moments, factors, target_shift(H, C, self._effort.damping)
        return self._shifts[key][2]


def _matrices(step: Step) -> Iterator[Tensor]:
    """The matrices [rows, cols] float32 that have a tap each: the tensor, or one per expert."""
    for part in step.tensor.parts if len(step.tensor.shape) == 3 else [None]:
        W = part.read().float() if part else step.tensor.read()
        for matrix in W.unbind(0) if W.dim() == 3 else [W]:
            check_finite(step.tensor, matrix, W)
            yield matrix
