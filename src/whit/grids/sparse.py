"""Levels learned from the weights, and beside the codes a few numbers of every row in half precision.

    value[r, c] = levels[code[r, c]] + (what the row has at column c, mostly nothing)

A handful of weights per row lie far from all others, or matter far more; levels that make room for them are missing
elsewhere. What is stored beside is the difference to the level, so that any rounding may work on the rest of the
matrix as it does without. Every row has as many, which makes the sparse matrix two small dense ones (the ELLPACK
format). Source: arXiv 2306.07629 (SqueezeLLM, dense and sparse), with a count per row instead of a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.codebook import Codebook
from whit.grids.grid import Params, Spec
from whit.grids.scaled import PerTensor

COLUMNS, VALUES = "columns", "values"
LARGEST = 0.1  # share: beyond it more levels are cheaper
ROUNDS = 3  # of choosing what lies beside, and learning levels from the rest


@dataclass(frozen=True)
class Sparse:
    """A codebook with outliers.

    base   tables per row or group
    share  of every row's weights that have a number of their own, above 0 and up to 0.1; at least one weight
    """

    base: Codebook
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= LARGEST:
            raise ValueError(f"the share of outliers is above 0 and at most {LARGEST:.0%}, found {self.share:.3%}")
        if isinstance(self.base.scheme, PerTensor):
            raise ValueError("outliers are for tables of rows and groups, not of a whole matrix")

    @property
    def step(self) -> int:
        """One code per weight."""
        return 1

    @property
    def row_independent(self) -> bool:
        """Every row has its own table and its own outliers."""
        return True

    def count(self, cols: int) -> int:
        """Outliers of a row."""
        return max(1, round(self.share * cols))

    def spans(self, cols: int) -> tuple[int, ...]:
        """As the base."""
        return self.base.spans(cols)

    def bits_per_weight(self, cols: int) -> float:
        """As the base, and for every outlier its column and its number."""
        return self.base.bits_per_weight(cols) + self.count(cols) * (8 * _index(cols).itemsize + 16) / cols

    def code_spec(self, shape: tuple[int, int]) -> Spec:
        """As the base."""
        return self.base.code_spec(shape)

    def schema(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """As the base, and [rows, count] `columns` int16 (int32 for more than 32,767 of them) and `values` float16.

        Raises ValueError when groups do not divide the rows.
        """
        beside = shape[0], self.count(shape[1])
        own = {COLUMNS: Spec(beside, _index(shape[1])), VALUES: Spec(beside, torch.float16)}
        return {**self.base.schema(shape), **own}

    def fit(self, W: Tensor) -> Params:
        """Of least squared error, all weights alike."""
        return self.search(W, None)

    def search(self, W: Tensor, weights: Tensor | None) -> Params:
        """Levels of least weighted squared error over what is left, beside it what would cost most.

        weights  [cols] or [rows, cols]
        The two choose each other in turn; no turn raises the loss but by rounding levels to half precision. One start
        are the weights farthest from the row's median, the other those farthest from the levels of all, and every row
        keeps the better end. Raises OverflowError.
        """
        mass = torch.ones_like(W) if weights is None else weights.expand_as(W)
        first, cost = self._turns(W, mass, W - W.median(1, keepdim=True).values)
        second, other = self._turns(W, mass, self._off(W, self.base.search(W, mass)))
        better = (other < cost)[:, None]
        return self.store({name: torch.where(better, second[name], each) for name, each in first.items()})

    def _turns(self, W: Tensor, mass: Tensor, off: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Parameters, and what they cost every row.

        off  [rows, cols] what is away most, to begin with
        """
        levels: Params = {}
        for _ in range(ROUNDS):
            levels = self.base.search(W, mass.scatter(1, self._worst(mass * off.square()), 0.0))
            off = self._off(W, levels)
        cost = mass * off.square()
        columns = self._worst(cost)
        found = {**levels, COLUMNS: columns.to(_index(W.shape[1])), VALUES: off.gather(1, columns)}
        return found, cost.scatter(1, columns, 0.0).sum(1)

    def _off(self, W: Tensor, levels: Params) -> Tensor:
        """W less its nearest levels."""
        return W - self.base.decode(self.base.round(W, levels), levels)

    def store(self, params: Params) -> Params:
        """In half precision. Raises OverflowError."""
        values = params[VALUES].to(torch.float16)
        if not torch.isfinite(values).all():
            raise OverflowError(f"an outlier of {params[VALUES].abs().max():.3g} does not fit float16")
        return {**self.base.store(self.levels(params)), COLUMNS: params[COLUMNS], VALUES: values}

    def round(self, W: Tensor, params: Params, weights: Tensor | None = None) -> Tensor:
        """uint8 codes of the levels nearest to what is left."""
        return self.base.round(W - self.beside(params, W.shape[1]), self.levels(params))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """[rows, cols] float32."""
        found = self.base.decode(codes, self.levels(params))
        return found.scatter_add_(1, params[COLUMNS].long(), params[VALUES].float())

    def beside(self, params: Params, cols: int) -> Tensor:
        """The outliers as a matrix [rows, cols] float32, mostly zeros."""
        values = params[VALUES].float()
        return values.new_zeros(len(values), cols).scatter_(1, params[COLUMNS].long(), values)

    def slopes(self, G: Tensor, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """As the base; of an outlier [rows, count], which is added to one weight, that weight's."""
        return {**self.base.slopes(G, codes, self.levels(params)), VALUES: G.gather(1, params[COLUMNS].long())}

    def levels(self, params: Params) -> Params:
        """The parameters of the base alone."""
        return {name: each for name, each in params.items() if name not in (COLUMNS, VALUES)}

    def check(self, params: Params, cols: int) -> None:
        """Raises ValueError when columns are not those of a row of `cols` weights, each once and in ascending order."""
        columns = params[COLUMNS]
        if not ((columns >= 0) & (columns < cols)).all():
            raise ValueError(f"outliers at columns that a row of {cols} weights does not have")
        if not (columns[:, 1:] > columns[:, :-1]).all():
            raise ValueError("outliers whose columns are not in ascending order, each once")

    def _worst(self, cost: Tensor) -> Tensor:
        """The columns [rows, count] that cost most, ascending; of equal ones the first, so that files are the same."""
        order = cost.argsort(dim=1, descending=True, stable=True)
        return order[:, : self.count(cost.shape[1])].sort(1).values


def _index(cols: int) -> torch.dtype:
    """What holds the number of a column."""
    return torch.int16 if cols <= torch.iinfo(torch.int16).max else torch.int32
