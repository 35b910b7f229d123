"""What a grid is: the values that a block of weights can take, and how they are stored.

A grid is a frozen value: comparable, hashable, printable. It knows nothing of algorithms, files or
models. The simpler design, one class per file format with rounding and packing fused, was left because
then every rounding has to be written once per format.

Two grids that compare equal hold the same values, so re-packing between them is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from whit.grids.levels import Levels

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one stored tensor of a quantized matrix."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Grid(Protocol):
    """The protocol that every rounding and every layout relies on. `W` is [rows, cols], float32."""

    @property
    def step(self) -> int:
        """Columns covered by one code: 1 for scalars, 4 or 8 for lattices."""
        ...

    @property
    def row_independent(self) -> bool:
        """True when rows share no parameters, so that any split into rows gives the same result."""
        ...

    def spans(self, cols: int) -> tuple[int, ...]:
        """Widths, in columns, over which parameters are shared, outermost first; (cols,) for one set a row."""
        ...

    def bits_per_weight(self, cols: int) -> float:
        """Stored bits per weight in a row of `cols` weights, parameters included."""
        ...

    def code_spec(self, shape: tuple[int, int]) -> Spec:
        """Shape and dtype of the codes of a [rows, cols] matrix."""
        ...

    def schema(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shape and dtype of every stored parameter of a [rows, cols] matrix.

        Raises ValueError when cols does not divide into the grid's spans.
        """
        ...

    def fit(self, W: Tensor) -> Params:
        """Parameters from the range of each block, before they are rounded to their stored dtype."""
        ...

    def search(self, W: Tensor, weights: Tensor | None) -> Params:
        """Stored parameters that make sum(weights * (W - decoded)^2) small in every block.

        weights  broadcastable to W, non-negative: the importance of each weight; None for all the same
        """
        ...

    def store(self, params: Params) -> Params:
        """The parameters as a file holds them; raises OverflowError when one leaves its dtype's range."""
        ...

    def round(self, W: Tensor, params: Params, weights: Tensor | None = None) -> Tensor:
        """Codes of the levels nearest to W under these parameters.

        weights  as for `search`; where a code is one weight they do not matter
        """
        ...

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """[rows, cols] float32, in the operation order of the runtimes' own decoders."""
        ...


class Adaptive(Grid, Protocol):
    """A grid that error feedback and polish can work on: its blocks are choices that may wait for each other."""

    def effective(self, params: Params) -> tuple[Tensor, Tensor | None]:
        """Per inner span [rows, cols // inner], float32: scale and offset, value = scale * level + offset."""
        ...

    def late(self, W: Tensor, weights: Tensor, params: Params, inner: int) -> Params:
        """The parameters with those of one inner span chosen again, the outer ones fixed.

        W        [rows, inner width], what this span should hold by now
        weights  broadcastable to W
        params   of one outer span
        Never worse than `params` in weighted squared error of any row.
        """
        ...

    def bases(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """For every float parameter [rows, outer spans] the [rows, cols] factor that it is multiplied with.

        decoded = sum over parameters of the parameter, repeated over its outer span, times its basis.
        """
        ...


class Scalar(Adaptive, Protocol):
    """An adaptive grid with a code per weight."""

    @property
    def levels(self) -> Levels:
        """The level set that all inner spans share."""
        ...


class Vector(Adaptive, Protocol):
    """An adaptive grid with a code per step of several weights."""

    def values(self, codes: Tensor) -> Tensor:
        """The points [n, step] float32 that codes [n] stand for."""
        ...

    def nearest_under(self, x: Tensor, P: Tensor) -> Tensor:
        """Codes [n] of the points nearest to x [n, step] in the metric P [step, step]."""
        ...
