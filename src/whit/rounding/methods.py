"""Roundings that know what arrives at a layer, by name.

    weighted   scales searched with the mean squared input of every column: what an importance matrix does
    gptq       error feedback under the range rule's scales, as published
    feedback   error feedback, scales searched on its targets, then refit and coordinate descent, then the floor

`feedback` is never worse than plain rounding on any row: rows where it would be are stored as plain rounding has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from whit.errors import RecipeError
from whit.grids.grid import Adaptive
from whit.grids.quantized import QuantizedTensor
from whit.rounding.curvature import Curvature
from whit.rounding.feedback import feedback
from whit.rounding.nearest import ROUNDINGS, nearest, search
from whit.rounding.polish import Scored, better_rows, polish, scored

Method = Callable[[Tensor, Adaptive, Curvature, "Effort"], QuantizedTensor]


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


def weighted(W: Tensor, grid: Adaptive, c: Curvature, effort: Effort) -> QuantizedTensor:
    """Nearest level under parameters searched with the diagonal of H."""
    return search(W, grid, c.H.diagonal())


def gptq(W: Tensor, grid: Adaptive, c: Curvature, effort: Effort) -> QuantizedTensor:
    """GPTQ: the range rule gives the scales of W itself, feedback chooses the codes. Source: arXiv 2210.17323."""
    return feedback(W, grid, c, scales="range")


def polished(W: Tensor, grid: Adaptive, c: Curvature, effort: Effort) -> QuantizedTensor:
    """Feedback, then polish."""
    return polish(W, feedback(W, grid, c, late=effort.late), grid, c, effort.sweeps)


FLOORED = "feedback"
METHODS: dict[str, Method] = {"weighted": weighted, "gptq": gptq, FLOORED: polished}


def rounded(name: str, W: Tensor, grid: Adaptive, c: Curvature, effort: Effort) -> tuple[Scored, Scored]:
    """W [rows, cols] float32 by the method called `name`, and for comparison by plain rounding.

    Raises ValueError when cols does not fit the grid, OverflowError when a scale leaves its dtype.
    """
    plain = scored(W, nearest(W, grid), c.H)
    found = scored(W, METHODS[name](W, grid, c, effort), c.H)
    return (better_rows(found, plain) if name == FLOORED else found), plain


def check_rounding(name: str) -> None:
    """Raise RecipeError, listing the names there are, when no rounding is called `name`."""
    if name not in ROUNDINGS and name not in METHODS:
        raise RecipeError(f"There is no rounding called {name!r}. Known: {', '.join([*ROUNDINGS, *METHODS])}.")
