"""Levels learned from the weights: every output channel has its own 2^b numbers, and a code says which.

    value[r, c] = levels[r, code[r, c]]

The smallest sum of squared errors in one dimension is k-means; this is Lloyd's iteration from quantiles, the simple
version (weights of the errors as importances). There is no scale and no group: the table is the parameter.
Source: arXiv 2306.07629 (SqueezeLLM); Lloyd 1982.
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
        """Lloyd's iteration on every row, from quantiles; a level that nothing is nearest to stays where it is."""
        x, order = W.float().contiguous().sort(1)
        v = weights.float().gather(1, order).clamp(min=1e-30)
        n = 2**self.bits
        at = ((torch.arange(n, device=W.device) + 0.5) / n * W.shape[1]).long()
        levels = x[:, at].contiguous()
        for _ in range(ITERATIONS):
            codes = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, x)
            mass = torch.zeros_like(levels).scatter_add_(1, codes, v)
            total = torch.zeros_like(levels).scatter_add_(1, codes, v * x)
            levels = torch.where(mass > 0, total / mass.clamp(min=1e-30), levels).sort(1).values
        return {"levels": levels}
