"""The same values on another grid: exact, or not at all.

Many grids hold others: symmetric integers are integers with the zero point in the middle, a group of 128 is four
groups of 32 with one scale, a minimum may be a whole multiple of its scale. Codes and parameters are written anew and
nothing is rounded; what comes out is compared with what went in, value by value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whit.grids.floats import Float
from whit.grids.grid import Grid
from whit.grids.indexed import INDEX, Indexed
from whit.grids.levels import Integers
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import Offset, Scaled


def recast(q: QuantizedTensor, grid: Grid) -> QuantizedTensor | None:
    """The matrix on `grid` with every decoded value the same, None when this grid cannot hold it so."""
    if grid == q.grid:
        return q
    found: QuantizedTensor | None = None
    if isinstance(grid, Float):
        values = q.dequantize()
        found = QuantizedTensor(grid, q.shape, values.to(grid.dtype), {})
    elif isinstance(grid, Indexed) and isinstance(q.grid, Indexed):
        plain = _scaled(q, q.grid.base, grid.base, q.params["scale"].shape[1])
        found = plain and QuantizedTensor(grid, q.shape, plain[0], {**plain[1], INDEX: q.params[INDEX]})
    elif isinstance(grid, Scaled) and isinstance(q.grid, Scaled):
        try:
            per_row = grid.schema(q.shape)["scale"].shape[1]
        except ValueError:
            return None
        plain = _scaled(q, q.grid, grid, per_row)
        found = plain and QuantizedTensor(grid, q.shape, *plain)
    return found if found is not None and torch.equal(found.dequantize(), q.dequantize()) else None


def first_exact(q: QuantizedTensor, grids: Sequence[Grid]) -> QuantizedTensor | None:
    """The matrix on the first of these grids that holds it exactly."""
    return next((found for grid in grids if (found := recast(q, grid)) is not None), None)


def _scaled(
    q: QuantizedTensor, source: Scaled, target: Scaled, per_row: int
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Codes and parameters that are right if the target can hold them at all; whether they are is checked above."""
    groups = q.params["scale"].shape[1]
    if per_row % groups:
        return None  # larger groups, whose scales would have to be equal
    params = {name: _spread(value, q.shape[0], per_row) for name, value in q.params.items() if name != INDEX}
    scale = params["scale"] = params["scale"].float() * (source.unit / target.unit)
    if source.levels == target.levels and source.offset is target.offset:
        return q.codes, {name: value.to(_dtype(name, target)) for name, value in params.items()}
    if not (isinstance(source.levels, Integers) and isinstance(target.levels, Integers)):
        return None
    zero = _zero(source, params)
    if zero is None:
        return None
    levels = source.levels.values(q.codes)  # before zero points
    of_columns = _columns(zero, q)
    whole = levels - of_columns  # what the scale is multiplied with
    top = 2**target.levels.bits - 1
    if target.offset is Offset.NONE:
        codes = whole + target.levels.zero
        if codes.min() < 0 or codes.max() > top:
            return None
        return codes.to(torch.uint8), {"scale": scale.to(target.scale_dtype)}
    moved = zero if source.offset is not Offset.NONE else torch.full_like(scale.float(), float(source.levels.zero))
    codes = whole + _columns(moved, q)
    if codes.min() < 0 or codes.max() > top or moved.max() > 255:
        return None
    found = {"scale": scale.to(target.scale_dtype)}
    if target.offset is Offset.ZERO_POINT:
        found["zero"] = moved.to(torch.uint8)
    else:
        found["minimum"] = (-scale.float() * moved).to(target.scale_dtype)
    return codes.to(torch.uint8), found


def _zero(source: Scaled, params: dict[str, Tensor]) -> Tensor | None:
    """What is subtracted from levels in every group, float32; None when it is no whole number from 0 to 255."""
    scale = params["scale"].float()
    if source.offset is Offset.NONE:
        return torch.zeros_like(scale)
    if source.offset is Offset.ZERO_POINT:
        return params["zero"].float()
    zero = torch.where(scale == 0, 0.0, -params["minimum"].float() / scale).round()
    return zero if bool(((zero >= 0) & (zero <= 255)).all()) else None


def _spread(value: Tensor, rows: int, per_row: int) -> Tensor:
    """A parameter of groups [rows, groups], or of the whole matrix [1, 1], for `per_row` groups."""
    return value.expand(rows, -1).repeat_interleave(per_row // value.shape[1], dim=1)


def _columns(value: Tensor, q: QuantizedTensor) -> Tensor:
    """A value of every group for every column."""
    if INDEX in q.params:
        return value[:, q.params[INDEX].long()]
    return value.repeat_interleave(q.shape[1] // value.shape[1], dim=1)


def _dtype(name: str, target: Scaled) -> torch.dtype:
    return torch.uint8 if name == "zero" else target.scale_dtype
