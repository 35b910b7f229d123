"""Every grid that has a name, one line each: the registry that commands, recipes and tests derive from."""

from __future__ import annotations

from dataclasses import replace

import torch

from whit.errors import RecipeError
from whit.grids.floats import Float
from whit.grids.grid import Grid
from whit.grids.indexed import INDEX, Indexed
from whit.grids.lattice import Lattice
from whit.grids.levels import Integers, Table
from whit.grids.scaled import Offset, PerChannel, PerGroup, PerTensor, Scaled, Scheme, integer_grid
from whit.grids.superblock import Superblock

# Sixteen levels that are denser near zero. Source: the IQ4_NL block format of GGML.
IQ4_NL_LEVELS = Table(
    "iq4_nl", (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
)  # fmt: skip

# FP4 (E2M1): two exponent bits, one of the mantissa. Minus zero is another name for zero.
FP4_LEVELS = Table("fp4", (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6))
# NVFP4 has a float32 beside the scales of a matrix, usually such that the largest uses all of FP8's range. With a fixed
# one scales have their full precision from 1.2e-4 to 3.5, that is groups whose largest weights are 7e-4 to 21, and
# matrices that a runtime fuses agree. Files with others have their own `unit`.
# FP8 (E4M3, no infinities): every finite value. Minus zero is another name for zero.
_FP8 = [2.0 ** (max(e, 1) - 10) * (8 * (e > 0) + m) for e in range(16) for m in range(8)][:-1]  # the last is NaN
FP8_LEVELS = Table("fp8_e4m3", tuple(sorted({sign * x for sign in (-1, 1) for x in _FP8})))
# Three levels in two bits: the fourth code may be in a file and is decoded, but nothing is rounded to it.
TERNARY_LEVELS = Table("ternary", (-1, 0, 1, 2), usable=3)

_GGML_GROUP = PerGroup(32)
_GROUPS = {f"-g{n}": PerGroup(n) for n in (32, 64, 128)}
_SCHEMES: dict[str, Scheme] = {"": PerChannel(), "-tensor": PerTensor(), **_GROUPS}
_INTEGERS = {
    f"int{b}{scheme}{zero}": integer_grid(b, sharing, symmetric=not zero)
    for scheme, sharing in _SCHEMES.items()
    for zero in ("", "-asym")
    for b in range(2, 9)
}
ALIASES = {"int4-g32": "q4_0", "int5-g32": "q5_0", "int8-g32": "q8_0"}  # the same grids

GRIDS: dict[str, Grid] = {
    "f32": Float(torch.float32),
    "f16": Float(torch.float16),
    "bf16": Float(torch.bfloat16),
    "q8_0": integer_grid(8, _GGML_GROUP, symmetric=True),
    "q5_1": Scaled(Integers(5, 0), _GGML_GROUP, Offset.MINIMUM),
    "q5_0": integer_grid(5, _GGML_GROUP, symmetric=True),
    "q4_1": Scaled(Integers(4, 0), _GGML_GROUP, Offset.MINIMUM),
    "q4_0": integer_grid(4, _GGML_GROUP, symmetric=True),
    "iq4_nl": Scaled(IQ4_NL_LEVELS, _GGML_GROUP),
    "q2_k": Superblock(Integers(2, 0), 16, 0, 15, minimum=True),
    "q3_k": Superblock(Integers(3, 4), 16, -32, 31),
    "q4_k": Superblock(Integers(4, 0), 32, 0, 63, minimum=True),
    "q5_k": Superblock(Integers(5, 0), 32, 0, 63, minimum=True),
    "q6_k": Superblock(Integers(6, 32), 16, -128, 127),
    "iq4_xs": Superblock(IQ4_NL_LEVELS, 32, -32, 31),
    "iq2_xxs": Lattice("iq2_xxs", 8, 8, True, 32, 1 / 8),
    "iq2_xs": Lattice("iq2_xs", 8, 9, True, 16, 1 / 8),
    "iq2_s": Lattice("iq2_s", 8, 10, False, 16, 1 / 8),
    "iq3_xxs": Lattice("iq3_xxs", 4, 8, True, 32, 1 / 4),
    "iq3_s": Lattice("iq3_s", 4, 9, False, 32, 1.0),
    "mxfp4": Scaled(FP4_LEVELS, _GGML_GROUP, scale_dtype=torch.float8_e8m0fnu),
    "nvfp4": Scaled(FP4_LEVELS, PerGroup(16), scale_dtype=torch.float8_e4m3fn, unit=2.0**-7),
    "tq2_0": Scaled(TERNARY_LEVELS, PerGroup(256)),
    "tq1_0": Scaled(Table("trits", (-1, 0, 1)), PerGroup(256), code_bits=52 * 8 / 256),
    **{name: grid for name, grid in _INTEGERS.items() if name not in ALIASES},
    "fp8": Scaled(FP8_LEVELS, PerChannel(), scale_dtype=torch.float32),
    "fp8-tensor": Scaled(FP8_LEVELS, PerTensor(), scale_dtype=torch.float32),
}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def grid_named(name: str) -> Grid:
    """The grid called `name`, as in GRIDS; `:bf16` or `:f32` after it is the dtype of its scales, `:g_idx` an index of
    groups, `@0.01` what a stored scale of 1 stands for.

    Raises RecipeError that lists the names there are.
    """
    plain, _, dtype = name.partition(":")
    plain, _, unit = plain.partition("@")
    grid = GRIDS.get(ALIASES.get(plain, plain))
    if unit and isinstance(grid, Scaled):
        grid = replace(grid, unit=_unit(unit, name))
    if dtype == INDEX and isinstance(grid, Scaled) and isinstance(grid.scheme, PerGroup):
        return Indexed(grid)
    if grid is None or (dtype and not (dtype in DTYPES and isinstance(grid, Scaled))):
        raise RecipeError(f"There is no grid called {name!r}. Known grids: {', '.join(GRIDS)}.")
    return replace(grid, scale_dtype=DTYPES[dtype]) if dtype and isinstance(grid, Scaled) else grid


def _unit(text: str, name: str) -> float:
    try:
        unit = float(text)
    except ValueError:
        unit = 0.0
    if not 0 < unit < float("inf"):
        raise RecipeError(f"{name!r}: {text!r} is not a positive number.")
    return unit


def integer_name(grid: Grid) -> str:
    """As `grid_name`, but for GGML's legacy types the name that says bits and group."""
    name = grid_name(grid)
    return next((alias for alias, known in ALIASES.items() if known == name), name)


def grid_name(grid: Grid) -> str:
    """The name that `grid_named` takes for a grid, else its printed form."""
    for name, known in GRIDS.items():
        if known == grid:
            return name
    if isinstance(grid, Indexed):
        return f"{grid_name(grid.base)}:{INDEX}"
    if isinstance(grid, Scaled):
        for name, known in GRIDS.items():
            if isinstance(known, Scaled) and replace(known, unit=grid.unit) == grid:
                return f"{name}@{grid.unit!r}"
        for dtype, stored in DTYPES.items():
            for name, known in GRIDS.items():
                if (
                    grid.scale_dtype == stored
                    and isinstance(known, Scaled)
                    and replace(known, scale_dtype=stored) == grid
                ):
                    return f"{name}:{dtype}"
    return repr(grid)
