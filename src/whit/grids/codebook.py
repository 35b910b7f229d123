"""Levels learned from the weights: every output channel has its own 2^b numbers, and a code says which.

    value[r, c] = levels[r, code[r, c]]

The smallest sum of squared errors in one dimension is k-means; this is Lloyd's iteration, the simple version (weights
of the errors as importances). It ends where it began if it begins badly: from quantiles, which crowd where most weights
are, 16 levels of normal weights keep 1.4 times the error that they need. Levels of many are best as dense as the cube
root of the weights' density, and that is the start here. There is no scale and no group: the table is the parameter.
Source: arXiv 2306.07629 (SqueezeLLM); Lloyd 1982; Panter and Dite 1951 for the density of the levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.grid import Params, Spec

ITERATIONS = 20


@dataclass(frozen=True)
class Codebook:
    """2^bits levels per row, ascending, stored in half precision.

    bits  1..8
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"codebooks have 1 to 8 bits, found {self.bits}")

    @property
    def step(self) -> int:
        """One code per weight."""
        return 1

    @property
    def row_independent(self) -> bool:
        """Every row has its own table."""
        return True

    def spans(self, cols: int) -> tuple[int, ...]:
        """The row."""
        return (cols,)

    def bits_per_weight(self, cols: int) -> float:
        """Code bits and the row's share of its table."""
        return self.bits + 16 * 2**self.bits / cols

    def code_spec(self, shape: tuple[int, int]) -> Spec:
        """uint8, one code per weight."""
        return Spec(shape, torch.uint8)

    def schema(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """`levels` [rows, 2^bits] half precision."""
        return {"levels": Spec((shape[0], 2**self.bits), torch.float16)}

    def fit(self, W: Tensor) -> Params:
        """Levels of least squared error, all weights alike."""
        return self._learned(W, torch.ones_like(W))

    def search(self, W: Tensor, weights: Tensor | None) -> Params:
        """Levels of least weighted squared error."""
        return self.store(self._learned(W, torch.ones_like(W) if weights is None else weights.expand_as(W)))

    def store(self, params: Params) -> Params:
        """In half precision. Raises OverflowError."""
        levels = params["levels"].to(torch.float16)
        if not torch.isfinite(levels).all():
            raise OverflowError(f"a level of {params['levels'].abs().max():.3g} does not fit float16")
        return {"levels": levels}

    def round(self, W: Tensor, params: Params, weights: Tensor | None = None) -> Tensor:
        """uint8 codes of the nearest levels; a tie goes to the lower one."""
        levels = params["levels"].float()
        return torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, W.contiguous()).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """[rows, cols] float32."""
        return params["levels"].float().gather(1, codes.long())

    def _learned(self, W: Tensor, weights: Tensor) -> Params:
        """Lloyd's iteration on every row; a level that nothing is nearest to stays where it is."""
        x, order = W.float().contiguous().sort(1)
        v = weights.float().gather(1, order).clamp(min=1e-30)
        levels = _start(x, v, 2**self.bits)
        for _ in range(ITERATIONS):
            codes = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, x)
            mass = torch.zeros_like(levels).scatter_add_(1, codes, v)
            total = torch.zeros_like(levels).scatter_add_(1, codes, v * x)
            levels = torch.where(mass > 0, total / mass.clamp(min=1e-30), levels).sort(1).values
        return {"levels": levels}


def _start(x: Tensor, v: Tensor, n: int) -> Tensor:
    """Levels [rows, n] as dense as the cube root of the density of x [rows, cols], ascending, with weights v.

    Rows of n different values or fewer have these as their levels.
    """
    width = x[:, 1:] - x[:, :-1]  # [rows, cols - 1]
    nth = _from_zero((width > 0).cumsum(1))  # [rows, cols], which of the different values
    levels = x[:, -1:].repeat(1, n).scatter_(1, nth.clamp(max=n - 1), x)
    many = nth[:, -1] >= n
    if not many.any():
        return levels
    x, v, width = x[many], v[many], width[many]
    density = (v[:, 1:] + v[:, :-1]).pow(1 / 3) * width.pow(-1 / 3)
    total = torch.where(width > 0, density * width, 0).double().cumsum(1)
    wanted = (torch.arange(n, device=x.device) + 0.5) / n * total[:, -1:]  # [rows, n]
    at = torch.searchsorted(total, wanted)
    before = _from_zero(total).gather(1, at)
    share = ((wanted - before) / (total.gather(1, at) - before)).float()
    levels[many] = x.gather(1, at) + width.gather(1, at) * share
    return levels


def _from_zero(x: Tensor) -> Tensor:
    """With a zero before every row."""
    return torch.nn.functional.pad(x, (1, 0))
