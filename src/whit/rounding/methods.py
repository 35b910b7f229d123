"""Roundings that know what arrives at a layer, by name.

    weighted   scales (or levels) searched with the mean squared input of every column: what an importance matrix does
    gptq       error feedback under the range rule's scales, as published
    feedback   error feedback, scales searched on its targets, then refit and coordinate descent, then the floor
    fisher     scales (or levels) searched with the Fisher information of every weight; k-means with it is SqueezeLLM
    fisher-feedback  as feedback; levels of codebooks begin with the Fisher information as well

Where nothing is known of a weight's Fisher information its column's mean squared input stands for it. Feedback is never
worse than plain rounding on any row: rows where it would be are stored as plain rounding has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from whit.grids.codebook import Codebook
from whit.grids.grid import Adaptive
from whit.grids.quantized import QuantizedTensor
from whit.grids.sparse import Sparse
from whit.rounding.curvature import Curvature
from whit.rounding.feedback import feedback
from whit.rounding.nearest import nearest, search
from whit.rounding.outliers import sparse_feedback
from whit.rounding.polish import Scored, better_rows, polish, scored
from whit.rounding.tables import table_feedback

Method = Callable[[Tensor, Adaptive, Curvature, "Effort", Tensor | None], QuantizedTensor]  # the last as F in `rounded`


@dataclass(frozen=True)
class Effort:
    """How much work rounding may do.

    sweeps   of coordinate descent, each with a refit of the scales
    damping  share of the mean of H's diagonal that is added to it
    late     whether inner spans choose their parameters when their turn comes
    rescale  whether columns may be rescaled where the tensors before them absorb it
    """

    sweeps: int = 2
    damping: float = 0.01
    late: bool = True
    rescale: bool = True


def weighted(W: Tensor, grid: Adaptive, c: Curvature, effort: Effort, F: Tensor | None = None) -> QuantizedTensor:
    """Nearest level under parameters searched with the diagonal of H."""
    return search(W, grid, c.H.diagonal())


def gptq(W: Tensor, grid: Adaptive, c: Curvature, effort: Effort, F: Tensor | None = None) -> QuantizedTensor:
    """GPTQ: the range rule gives the scales of W itself, feedback chooses the codes. Source: arXiv 2210.17323."""
    return feedback(W, grid, c, scales="range")


def polished(W: Tensor, grid: Adaptive, c: Curvature, effort: Effort, F: Tensor | None = None) -> QuantizedTensor:
    """Feedback, then polish."""
    return polish(W, feedback(W, grid, c, late=effort.late), grid, c, effort.sweeps)


def by_fisher(W: Tensor, grid: Adaptive, c: Curvature, effort: Effort, F: Tensor | None = None) -> QuantizedTensor:
    """Nearest level under parameters searched with the Fisher information. Source: arXiv 2306.07629 (SqueezeLLM)."""
    return search(W, grid, c.H.diagonal() if F is None else F)


def polished_by_fisher(
    W: Tensor, grid: Adaptive, c: Curvature, effort: Effort, F: Tensor | None = None
) -> QuantizedTensor:
    """As `polished`; a codebook's first levels know the Fisher information."""
    if isinstance(grid, Codebook):
        return polish(W, table_feedback(W, grid, c, F), grid, c, effort.sweeps)
    if isinstance(grid, Sparse):
        return polish(W, sparse_feedback(W, grid, c, F), grid, c, effort.sweeps)
    return polished(W, grid, c, effort)


FLOORED, BY_FISHER, FISHER_FLOORED = "feedback", "fisher", "fisher-feedback"
FISHER = (BY_FISHER, FISHER_FLOORED)
FLOORS = (FLOORED, FISHER_FLOORED)  # others are what their names say, of the weights as they are
METHODS: dict[str, Method] = {
    "weighted": weighted,
    "gptq": gptq,
    FLOORED: polished,
    BY_FISHER: by_fisher,
    FISHER_FLOORED: polished_by_fisher,
}


def rounded(
    name: str, W: Tensor, grid: Adaptive, c: Curvature, effort: Effort, F: Tensor | None = None
) -> tuple[Scored, Scored]:
    """W [rows, cols] float32 by the method called `name`, and for comparison by plain rounding.

    F  [rows, cols] float32, the Fisher information of every weight, where a method asks for it
    Raises ValueError when cols does not fit the grid, OverflowError when a scale leaves its dtype.
    """
    F = F if F is not None and F.any() else None  # all zeros: no token reached an expert
    plain = scored(W, nearest(W, grid), c.H)
    found = scored(W, METHODS[name](W, grid, c, effort, F), c.H)
    return (better_rows(found, plain) if name in FLOORS else found), plain
