"""Levels learned from the weights: a row, a group or the whole matrix has its own 2^b numbers, and a code says which.

    value[r, c] = levels[code[r, c]]      of the row, or the group of it, or the matrix

There is no scale: the table is the parameter. Which numbers leave the least weighted squared error is k-means in one
dimension, which has an exact solution (kmeans.py); error feedback chooses codes on a table, and with codes chosen the
best table under the layer's whole loss is a linear system (rounding/tables.py).
Source: arXiv 2306.07629 (SqueezeLLM) for tables per row weighed by Fisher information.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.grid import Params, Spec
from whit.grids.kmeans import kmeans
from whit.grids.scaled import PerChannel, PerGroup, PerTensor, Scheme, group_size_error

PER_CHANNEL = PerChannel()
LEVELS = "levels"  # the one parameter


@dataclass(frozen=True)
class Codebook:
    """2^bits levels per row, group or matrix, ascending, stored in half precision.

    bits    1..8
    scheme  which weights share a table
    """

    bits: int
    scheme: Scheme = PER_CHANNEL

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"codebooks have 1 to 8 bits, found {self.bits}")

    @property
    def step(self) -> int:
        """One code per weight."""
        return 1

    @property
    def n_levels(self) -> int:
        """Of a table."""
        return 2**self.bits

    @property
    def row_independent(self) -> bool:
        """False only when one table serves the whole matrix."""
        return not isinstance(self.scheme, PerTensor)

    def spans(self, cols: int) -> tuple[int, ...]:
        """The group width, or the whole row."""
        return (self.scheme.size,) if isinstance(self.scheme, PerGroup) else (cols,)

    def bits_per_weight(self, cols: int) -> float:
        """Code bits and the share of the table; that of a whole matrix counts as nothing."""
        if isinstance(self.scheme, PerTensor):
            return float(self.bits)
        return self.bits + 16 * self.n_levels / self.spans(cols)[0]

    def code_spec(self, shape: tuple[int, int]) -> Spec:
        """uint8, one code per weight."""
        return Spec(shape, torch.uint8)

    def schema(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """`levels` half precision: [rows, 2^bits]; [1, 2^bits] per tensor; [rows, groups * 2^bits] per group.

        Raises ValueError when groups do not divide the rows.
        """
        rows, cols = shape
        size = self.spans(cols)[0]
        if cols % size:
            raise ValueError(group_size_error(cols, size))
        if isinstance(self.scheme, PerTensor):
            return {"levels": Spec((1, self.n_levels), torch.float16)}
        return {"levels": Spec((rows, cols // max(1, size) * self.n_levels), torch.float16)}

    def fit(self, W: Tensor) -> Params:
        """Levels of least squared error, all weights alike."""
        return self._learned(W, torch.ones_like(W))

    def search(self, W: Tensor, weights: Tensor | None) -> Params:
        """Levels of least weighted squared error; weights [cols] or [rows, cols]."""
        return self.store(self._learned(W, torch.ones_like(W) if weights is None else weights.expand_as(W)))

    def store(self, params: Params) -> Params:
        """In half precision. Raises OverflowError."""
        levels = params["levels"].to(torch.float16)
        if not torch.isfinite(levels).all():
            raise OverflowError(f"a level of {params['levels'].abs().max():.3g} does not fit float16")
        return {"levels": levels}

    def round(self, W: Tensor, params: Params, weights: Tensor | None = None) -> Tensor:
        """uint8 codes of the nearest levels; a tie goes to the lower one."""
        levels = params["levels"].float().reshape(-1, self.n_levels)  # [tables, levels]
        codes = torch.searchsorted(middles(levels), self._blocks(W.contiguous()))
        return codes.to(torch.uint8).view(W.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """[rows, cols] float32."""
        return params["levels"].float().gather(1, self.index(codes)).view(codes.shape)

    def slopes(self, G: Tensor, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """dL/dlevels, as `schema` states, of dL/d decoded matrix G [rows, cols]: sums over the weights of a level."""
        at = self.index(codes)
        return {LEVELS: torch.zeros_like(params[LEVELS], dtype=G.dtype).scatter_add_(1, at, G.reshape(at.shape))}

    def index(self, codes: Tensor) -> Tensor:
        """Where each code's level lies in `levels` [n, m] as `schema` states: int64 [n, rows * cols // n]."""
        if isinstance(self.scheme, PerTensor):
            return codes.reshape(1, -1).long()
        if isinstance(self.scheme, PerGroup):
            group = torch.arange(codes.shape[1], device=codes.device) // self.scheme.size
            return codes.long() + group * self.n_levels
        return codes.long()

    def tables(self, params: Params, rows: int) -> Tensor:
        """The levels of every row's groups, float32 [rows, groups, 2^bits]."""
        levels = params["levels"].float()
        return levels.view(levels.shape[0], -1, self.n_levels).expand(rows, -1, -1)

    def _learned(self, W: Tensor, weights: Tensor) -> Params:
        levels = kmeans(self._blocks(W.float()), self._blocks(weights), self.n_levels)  # [tables, levels]
        return {"levels": levels.view(next(iter(self.schema(_shape(W)).values())).shape)}

    def _blocks(self, matrix: Tensor) -> Tensor:
        """[tables, weights that share one]."""
        rows, cols = matrix.shape
        if isinstance(self.scheme, PerTensor):
            return matrix.reshape(1, rows * cols)
        self.schema((rows, cols))  # divisibility
        return matrix.reshape(-1, self.spans(cols)[0])


def middles(levels: Tensor) -> Tensor:
    """Halfway between neighbouring levels [..., n]: [..., n - 1]; a number up to the i-th goes to level i."""
    return (levels[..., 1:] + levels[..., :-1]) / 2


def _shape(W: Tensor) -> tuple[int, int]:
    rows, cols = W.shape
    return rows, cols
