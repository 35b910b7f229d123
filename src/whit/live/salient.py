"""Input channels that matter most, kept in float beside a matrix on a grid.

    y = Q(W without them) x + W_salient x[channels] + b

A channel matters by its second moment times the squared norm of its column: what a rounding error of a given relative
size in it does to the output. A few of them carry much of it, and they are the outliers that stretch the scales of
their groups. A public file has no place for this (one matrix, one type), so it is for live models; rows of a matrix
need nothing of the kind, each has scales of its own. Source: arXiv 2306.07629 and 2206.01861 for the split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from whit.errors import RecipeError
from whit.grids.grid import Grid
from whit.grids.named import grid_name
from whit.live.modules import QConv1D, QLinear
from whit.live.run import Call, hooked, positions, steady
from whit.rounding.nearest import nearest

CHECKED = 8  # rows in which zeros must stay zeros


class Beside(nn.Module):
    """A linear layer with some of its columns in float.

    rest     the twin; its matrix has zeros in these columns until it is rounded
    columns  [n] int64, ascending
    side     [rows, n], the columns themselves, in the layer's own dtype; a parameter
    """

    def __init__(self, rest: QLinear | QConv1D, columns: Tensor, side: Tensor) -> None:
        """rest keeps what it has: `split` makes zeros of the columns, files hold what is to be loaded."""
        super().__init__()
        rest.alone = False
        self.rest = rest
        self.columns: Tensor
        self.register_buffer("columns", columns)
        self.side = nn.Parameter(side, requires_grad=side.requires_grad)

    @property
    def weight(self) -> Tensor:
        """As the original has it: codes or parameter with the float columns added."""
        W = self.rest.weight
        side = self.side.to(W.dtype)
        return W.index_add(0 if self.rest.turned else 1, self.columns, side.T if self.rest.turned else side)

    @property
    def bias(self) -> Tensor | None:
        """The layer's."""
        return self.rest.bias

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """x [..., in] -> [..., out], by whatever name the layer knows its input."""
        y = self.rest(*given, **named)
        (x,) = *given, *named.values()
        return y + functional.linear(x.index_select(-1, self.columns), self.side.to(x.dtype)).to(y.dtype)

    def check(self) -> None:
        """Raise ValueError when the columns, which may come from a file, are not ascending ones of the matrix."""
        n = self.rest.nx if isinstance(self.rest, QConv1D) else self.rest.in_features
        found = self.columns.tolist()
        if self.columns.dtype != torch.int64 or any(a >= b for a, b in pairwise([-1, *found, n])):
            raise ValueError(f"salient columns must be ascending integers below {n}, found {found}")

    def extra_repr(self) -> str:
        """How many columns are float."""
        return f"salient={self.columns.numel()}"


def split(rest: QLinear | QConv1D, squares: Tensor, share: float) -> Beside:
    """A layer with `share` of its input channels in float, at least one.

    squares  [cols], sum of the squares of what arrives at every channel
    The twin's parameter is changed in place.
    """
    W = rest.matrix
    n = min(W.shape[1] - 1, max(1, round(share * W.shape[1])))
    with torch.no_grad():
        worth = squares.double() * W.double().square().sum(0)
        columns = worth.topk(n).indices.sort().values
        side = W[:, columns].clone()
        W[:, columns] = 0
    rest.forget()
    return Beside(rest, columns, side.requires_grad_(W.requires_grad))


def squares_of(model: nn.Module, layers: Mapping[str, nn.Module], calls: Sequence[Call]) -> dict[str, Tensor]:
    """Sums of squares [cols] float64 of what arrives at layers; those that the calls never reach are not there.

    Padding is not counted.
    """
    found: dict[str, Tensor] = {}
    counted: Tensor | None = None

    def seen(name: str, x: Tensor) -> None:
        total = positions(x.detach(), counted).double().square().sum(0)
        found[name] = found[name] + total if name in found else total

    with torch.no_grad(), steady(model), hooked(layers, seen):
        for call in calls:
            counted = call.counted
            call(model)
    return found


def check_salient(share: float, grid: Grid) -> None:
    """Raise RecipeError for a share of channels that is none, and for a grid that has no zero to put in their place."""
    if not 0 < share < 1:
        raise RecipeError(f"salient={share!r} is not a share of the input channels, such as 0.01.")
    group = grid.spans(256)[0]  # whole groups of any size; a superblock is 256
    cols = 4 * group if 256 % group else 256
    W = torch.randn(CHECKED, cols, generator=torch.Generator().manual_seed(0)) + 0.1
    W[:, ::64] = 0
    if nearest(W, grid).dequantize()[:, ::64].any():
        raise RecipeError(
            f"salient= takes channels out of a matrix, and {grid_name(grid)} has no zero to put there. Take integers "
            "(qint4, int4-g64), nf4, fp4, mxfp4, nvfp4 or qfloat8."
        )
