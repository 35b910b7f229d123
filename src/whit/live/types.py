"""The types that weights and activations can have, by the names that people know: grids, nothing else.

`qint8` is symmetric 8-bit integers per output channel; the smaller ones share a scale (and a zero point) per group of
64 weights of a row. `grouped(qint4, 32)` is the same with another group. Given as `activations=`, `qint8` and
`qfloat8` mean 8 bits with one fixed scale where `calibrate` has found one, and one scale per token elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from whit.errors import RecipeError
from whit.grids.codebook import Codebook
from whit.grids.grid import Grid
from whit.grids.named import GRIDS, grid_named
from whit.grids.scaled import PerChannel, PerGroup, Scaled
from whit.recipes.quantizers import quantizer_named
from whit.rounding.nearest import nearest

qint8 = grid_named("int8:f32")
qint4 = grid_named("int4-g64-asym")
qint3 = grid_named("int3-g64-asym")
qint2 = grid_named("int2-g64-asym")
qfloat8 = qfloat8_e4m3 = GRIDS["fp8"]
qfloat8_e5m2 = GRIDS["fp8-e5m2"]
nf4 = GRIDS["nf4-g64"]
fp4 = grid_named("fp4-g64")
mxfp4 = GRIDS["mxfp4"]
nvfp4 = GRIDS["nvfp4"]
kmeans4 = Codebook(4)
kmeans3 = Codebook(3)
kmeans2 = Codebook(2)

TYPES: dict[str, Grid] = {
    "qint8": qint8,
    "qint4": qint4,
    "qint3": qint3,
    "qint2": qint2,
    "qfloat8": qfloat8,
    "qfloat8_e4m3": qfloat8_e4m3,
    "qfloat8_e4m3fn": qfloat8_e4m3,
    "qfloat8_e5m2": qfloat8_e5m2,
    "nf4": nf4,
    "fp4": fp4,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "kmeans4": kmeans4,
    "kmeans3": kmeans3,
    "kmeans2": kmeans2,
}
SIZES = (128, 64, 32, 16, 8)  # groups that are tried where the one that is asked for does not divide a row
BLOCKS = (mxfp4, nvfp4)  # whose groups are part of what they are
FLOAT8 = {torch.float8_e4m3fn: qfloat8, torch.float8_e5m2: qfloat8_e5m2}


def type_named(name: str | Grid | None) -> Grid | None:
    """The type called `name`: one of TYPES, a quantizer (its grid), or any grid.

    Raises RecipeError that lists the names there are, for other objects, too.
    """
    if not isinstance(name, str):
        if name is not None and not hasattr(name, "spans"):  # such as a number of bits, or a dtype of torch
            raise RecipeError(
                f"A type is a grid such as qint4, or a name, found {name!r}. Known types: {', '.join(TYPES)}."
            )
        return name
    try:
        if quantizer := quantizer_named(name):
            return grid_named(quantizer.grid)
        return TYPES[name] if name in TYPES else grid_named(name)
    except RecipeError as error:
        raise RecipeError(f"There is no type called {name!r}. Known types: {', '.join(TYPES)}. {error}") from None


def grouped(grid: Grid, size: int) -> Grid:
    """The same levels with one scale, or as many levels with one table, per `size` consecutive weights of a row.

    Raises RecipeError for grids whose groups are part of what they are.
    """
    if not isinstance(grid, Scaled | Codebook) or grid in BLOCKS or size < 1:
        raise RecipeError(f"{grid} has no groups of {size}.")
    return replace(grid, scheme=PerGroup(size))


def fitted(grid: Grid, cols: int) -> tuple[Grid, str]:
    """The grid with groups that divide rows of `cols` weights, and what was changed, empty for nothing.

    Raises RecipeError when none fit and one scale per row is no grid of this kind either.
    """
    if cols % grid.spans(cols)[0] == 0 and cols % grid.step == 0:
        return grid, ""
    if not isinstance(grid, Scaled | Codebook) or not isinstance(grid.scheme, PerGroup) or grid in BLOCKS:
        raise RecipeError(f"rows of {cols} weights do not divide into blocks of {grid.spans(cols)[0]}")
    asked = grid.scheme.size
    size = next((each for each in SIZES if each < asked and cols % each == 0), None)
    if size is None:
        one = "table" if isinstance(grid, Codebook) else "scale"
        return replace(grid, scheme=PerChannel()), f"one {one} per row: no group divides {cols} weights"
    return replace(grid, scheme=PerGroup(size)), f"groups of {size}: {asked} do not divide {cols} weights"


def out_of_reach(grid: Grid, W: Tensor) -> str:
    """Why weights of this size cannot be on a grid, whose scales have few bits; empty when they can.

    W  of any shape; only its largest value is looked at, in groups that span both signs. No scale is larger for others
    """
    if W.is_meta or not W.numel():
        return ""
    largest = max(abs(float(each)) for each in torch.aminmax(W.detach()))
    if not largest:
        return ""
    cols = 256 if 256 % grid.spans(256)[0] == 0 else 4 * grid.spans(256)[0]
    widest = torch.full((1, cols), largest)
    widest[:, ::2] *= -1
    try:
        seen = nearest(widest, grid).dequantize()
    except OverflowError as error:
        return f"weights as large as {largest:.3g} leave the grid's range: {error}"
    return "" if seen.any() else f"weights no larger than {largest:.3g} are all zeros on this grid"
