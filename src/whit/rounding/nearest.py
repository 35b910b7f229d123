"""Rounding without error feedback: nearest level, with parameters from the range or from a search.

    nearest   the range of each group laid onto the grid; codes chosen before the scale is rounded to its stored
              precision. That order is GGML's, so the bytes equal those of its reference encoders.
    search    parameters of least weighted squared error; codes nearest to what the decoder will see.

Neither needs calibration data. Given the mean squared activation of every input channel, `search` minimises the
first-order output error. Without, it minimises the plain squared error, which helps less than it seems it should.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from whit.grids.grid import Grid
from whit.grids.onepass import nearest_codes
from whit.grids.quantized import QuantizedTensor

# Weights worked on at a time. Temporaries stay inside a core's cache, and torch uses one thread: from 32768 values
# on it splits an operation over its threads, which wait for each other by spinning. With another process on a core,
# the hundreds of thousands of short operations of one model then take fifty times as long (docs/log.md).
SLICE = 32767


class Rounding(Protocol):
    """Weights [rows, cols] and optional importance per input channel [cols] or weight to codes on a grid.

    W           float32, bfloat16 or float16
    importance  non-negative, as float32
    """

    def __call__(self, W: Tensor, grid: Grid, importance: Tensor | None = None) -> QuantizedTensor:
        """Raises ValueError when cols does not fit the grid's spans, OverflowError when a scale does not fit."""
        ...


def nearest(W: Tensor, grid: Grid, importance: Tensor | None = None) -> QuantizedTensor:
    """Nearest level under the range rule of the grid; `importance` plays no part.

    W  [rows, cols] float32, bfloat16 or float16
    """
    return in_one_pass(W, grid) or by_rows(W, grid, lambda part: _plain(part, grid))


def in_one_pass(W: Tensor, grid: Grid) -> QuantizedTensor | None:
    """`nearest` of W by the compiled library, which refuses weights that are not finite; None where it does not serve.

    W  [rows, cols] float32, bfloat16 or float16
    """
    found = nearest_codes(W, grid)
    return None if found is None else QuantizedTensor(grid, _shape(W), *found)


def search(W: Tensor, grid: Grid, importance: Tensor | None = None) -> QuantizedTensor:
    """Nearest level under searched parameters; never worse than `nearest` in weighted squared error of any group.

    W           [rows, cols] float32, bfloat16 or float16
    importance  [cols] or [rows, cols] float32, non-negative; all the same when None
    """
    if importance is None or importance.dim() == 1 or not grid.row_independent:
        given = None if importance is None else importance.float()
        return by_rows(W, grid, lambda part: _searched(part, grid, given))
    each = iter(slices(importance.float()))  # beside the slices of W, in their order
    return by_rows(W, grid, lambda part: _searched(part, grid, next(each)))


def _plain(W: Tensor, grid: Grid) -> QuantizedTensor:
    exact = grid.fit(W)
    return QuantizedTensor(grid, _shape(W), grid.round(W, exact), grid.store(exact))


def _searched(W: Tensor, grid: Grid, weights: Tensor | None) -> QuantizedTensor:
    params = grid.search(W, weights)
    return QuantizedTensor(grid, _shape(W), grid.round(W, params, weights), params)


def by_rows(W: Tensor, grid: Grid, rounded: Callable[[Tensor], QuantizedTensor]) -> QuantizedTensor:
    """W [rows, cols] rounded as float32 in slices where rows share nothing, else as a whole."""
    if not grid.row_independent or W.numel() <= SLICE:
        return rounded(W.float())
    parts = [rounded(part.float()) for part in slices(W)]
    params = {name: torch.cat([part.params[name] for part in parts]) for name in parts[0].params}
    return QuantizedTensor(grid, _shape(W), torch.cat([part.codes for part in parts]), params)


def slices(W: Tensor, n: int = SLICE) -> Sequence[Tensor]:
    """A matrix [rows, cols] in slices of whole rows, of about `n` weights: as a rule what one core works on best."""
    return W.split(max(1, n // max(1, W.shape[1])))


def _shape(W: Tensor) -> tuple[int, int]:
    rows, cols = W.shape
    return rows, cols
