"""Every grid that has a name, one line each: the registry that commands, recipes and tests derive from."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from whit.errors import RecipeError
from whit.grids.codebook import Codebook
from whit.grids.floats import Float
from whit.grids.grid import Grid
from whit.grids.indexed import INDEX, Indexed
from whit.grids.lattice import Lattice
from whit.grids.levels import Integers, Table
from whit.grids.scaled import Offset, PerChannel, PerGroup, PerTensor, Scaled, Scheme, integer_grid
from whit.grids.sparse import Sparse
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
# FP8 (E5M2): the upper half of half precision; the last exponent is infinity and NaN.
_E5M2 = [2.0 ** (max(e, 1) - 17) * (4 * (e > 0) + m) for e in range(31) for m in range(4)]
E5M2_LEVELS = Table("fp8_e5m2", tuple(sorted({sign * x for sign in (-1, 1) for x in _E5M2})))
# NF4: quantiles of a normal distribution, the largest 1. Source: arXiv 2305.14314 (QLoRA), appendix E.
NF4_LEVELS = Table(
    "nf4",
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
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
    "fp8-e5m2": Scaled(E5M2_LEVELS, PerChannel(), scale_dtype=torch.float32),
    "nf4-g64": Scaled(NF4_LEVELS, PerGroup(64)),
    **{f"kmeans{bits}": Codebook(bits) for bits in (2, 3, 4, 8)},
    **{f"kmeans{bits}{s}": Codebook(bits, _SCHEMES[s]) for s in ("-tensor", "-g64", "-g128") for bits in (2, 3, 4)},
}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def grid_named(name: str) -> Grid:
    """The grid called `name`, as in GRIDS; `:bf16` or `:f32` after it is the dtype of its scales, `:g_idx` an index of
    groups, `@0.01` what a stored scale of 1 stands for, `+0.5%` after tables of levels how many weights lie beside.

    Raises RecipeError that lists the names there are.
    """
    if "+" in name:
        return _with_outliers(name)
    plain, _, dtype = name.partition(":")
    plain, _, unit = plain.partition("@")
    plain = f"kmeans{plain.removeprefix('codebook')}" if plain.startswith("codebook") else plain  # their first name
    grid = GRIDS.get(ALIASES.get(plain, plain)) or _composed(plain)
    if unit and isinstance(grid, Scaled):
        grid = replace(grid, unit=_unit(unit, name))
    if dtype == INDEX and isinstance(grid, Scaled) and isinstance(grid.scheme, PerGroup):
        return Indexed(grid)
    if grid is None or (dtype and not (dtype in DTYPES and isinstance(grid, Scaled))):
        raise RecipeError(f"There is no grid called {name!r}. Known grids: {', '.join(GRIDS)}.")
    return replace(grid, scale_dtype=DTYPES[dtype]) if dtype and isinstance(grid, Scaled) else grid


def _with_outliers(name: str) -> Sparse:
    plain, _, share = name.partition("+")
    base = grid_named(plain)
    try:
        if not isinstance(base, Codebook) or not share.endswith("%"):
            raise ValueError("outliers are a share in percent beside k-means")
        return Sparse(base, float(share[:-1]) / 100)
    except ValueError as error:
        raise RecipeError(f"{name!r} is no grid: {error}. One that is: kmeans4+0.5%.") from None


_TABLES = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS, "fp8": FP8_LEVELS, "fp8-e5m2": E5M2_LEVELS}


def _composed(name: str) -> Grid | None:
    """A grid that has no line of its own, such as `int4-g16-min`: levels, groups, what is stored beside the scale."""
    found = re.fullmatch(r"(int([2-8])|kmeans([1-8])|nf4|fp4|fp8|fp8-e5m2)(-g([1-9]\d*)|-tensor|)(-asym|-min|)", name)
    if found is None or (found[6] and not found[2]):
        return None
    scheme = PerGroup(int(found[5])) if found[5] else _SCHEMES[found[4]]
    if found[3]:
        return Codebook(int(found[3]), scheme)
    if found[6] == "-min":
        return Scaled(Integers(int(found[2]), 0), scheme, Offset.MINIMUM)
    if found[2]:
        return integer_grid(int(found[2]), scheme, symmetric=not found[6])
    return Scaled(_TABLES[found[1]], scheme)


def _composition(grid: Scaled) -> str:
    """The name that `_composed` takes for a grid with half-precision scales, else its printed form."""
    levels = next((name for name, each in _TABLES.items() if each == grid.levels), f"int{grid.levels.bits}")
    offset = {Offset.NONE: "", Offset.ZERO_POINT: "-asym", Offset.MINIMUM: "-min"}[grid.offset]
    name = levels + _suffix(grid.scheme) + offset
    return name if _composed(name) == grid else repr(grid)


def _suffix(scheme: Scheme) -> str:
    return f"-g{scheme.size}" if isinstance(scheme, PerGroup) else "-tensor" if isinstance(scheme, PerTensor) else ""


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
    if isinstance(grid, Codebook):
        return f"kmeans{grid.bits}{_suffix(grid.scheme)}"
    if isinstance(grid, Sparse):
        return f"{grid_name(grid.base)}+{round(100 * grid.share, 9):g}%"
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
                    and (known.scale_dtype in DTYPES.values() or grid.unit != 1)  # mxfp4 says its scales itself
                    and replace(known, scale_dtype=stored) == grid
                ):
                    return f"{name}:{dtype}"
        for dtype, stored in DTYPES.items():
            if grid.scale_dtype == stored and grid.unit == 1:
                name = _composition(replace(grid, scale_dtype=torch.float16))
                return name if dtype == "f16" or name.startswith("Scaled") else f"{name}:{dtype}"
    return repr(grid)
