"""How a quantized matrix lies in memory: the numbers that the kernels need besides its tensors.

Three forms. **Tiles** hold every `Scaled` grid of 2 to 8 bits whose groups divide into blocks of columns: sixteen rows
side by side, so that a vector register holds one row per lane and no sum runs across lanes. **Rows** hold grids with
tables of levels for rows, groups or the matrix, one row after the other: a table then stays in registers while its
columns pass. What a row has beside its codes stays as it is stored.
Everything else is **plain**: dense bits in the order of the codes, decoded by the grid itself.

Which form a matrix takes depends on its grid and shape alone, never on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from whit.grids.codebook import Codebook
from whit.grids.grid import Grid, Spec
from whit.grids.lattice import Lattice
from whit.grids.levels import Integers, Table
from whit.grids.scaled import PerGroup, Scaled
from whit.grids.sparse import Sparse

LANES = 16  # rows of a tile, columns of a step in the row form
QUAD = 4  # columns whose codes lie in one 32-bit lane
ROW_BLOCKS = {2: 64, 3: 64, 4: 32, 8: 32}  # columns that are packed together in the row form, by bits


class Kind(Enum):
    """The order of the codes in memory."""

    TILES = "tiles"
    ROWS = "rows"
    PLAIN = "plain"


@dataclass(frozen=True)
class Form:
    """What the kernels know of a matrix.

    kind   the order of the codes
    rows, cols  of the matrix
    bits   of a code
    group  columns that share parameters, in the tile form a multiple of `block`; beyond cols when rows are padded
    zero   the code of level 0 (integer levels), -1 when there is a table
    unit   what a stored scale of 1 stands for
    """

    kind: Kind
    rows: int
    cols: int
    bits: int
    group: int
    zero: int
    unit: float

    @property
    def block(self) -> int:
        """Columns that are packed together, the unit to which rows are padded."""
        if self.kind is Kind.ROWS:
            return ROW_BLOCKS[self.bits]
        return block_of(self.bits)

    @property
    def padded(self) -> int:
        """Columns in memory."""
        return -(-self.cols // self.block) * self.block

    @property
    def tiles(self) -> int:
        """Tiles of sixteen rows."""
        return -(-self.rows // LANES)

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.padded // self.group


def block_of(bits: int) -> int:
    """Columns of a block in the tile form: 32 when a plane of single bits is among the planes, else 16."""
    return 32 if bits & 1 else 16


def planes(bits: int) -> list[tuple[int, int]]:
    """Width and shift of the planes that hold a code: 5 bits are the low four and the one above."""
    found, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, shift))
            shift += width
    return found


def form_of(grid: Grid, shape: tuple[int, int]) -> Form:
    """The form that a matrix of this grid and shape takes."""
    if torch.compiler.is_compiling():  # the compiler looks behind caches, and warns that it does
        return _form(grid, shape)
    return _remembered(grid, shape)  # type: ignore[arg-type]  # grids are frozen values


def _form(grid: Grid, shape: tuple[int, int]) -> Form:
    rows, cols = shape
    plain = Form(Kind.PLAIN, rows, cols, _plain_bits(grid, shape), 1, -1, 1.0)
    grid.schema(shape)  # divisibility
    tables = grid.base if isinstance(grid, Sparse) else grid
    if isinstance(tables, Codebook) and plain.bits in ROW_BLOCKS:
        form = replace(plain, kind=Kind.ROWS)
        if not isinstance(tables.scheme, PerGroup) or tables.scheme.size == cols:
            return replace(form, group=form.padded)
        least = form.block if plain.bits == 8 else LANES  # what meets one table at a time
        return plain if tables.scheme.size % least else replace(form, group=tables.scheme.size)
    if not isinstance(grid, Scaled) or not 2 <= plain.bits <= 8:
        return plain
    form = replace(plain, kind=Kind.TILES, unit=grid.unit)
    if isinstance(grid.scheme, PerGroup) and grid.scheme.size != cols:
        if grid.scheme.size % form.block:
            return plain
        form = replace(form, group=grid.scheme.size)
    else:
        form = replace(form, group=form.padded)
    return replace(form, zero=grid.levels.zero) if isinstance(grid.levels, Integers) else form


_remembered = lru_cache(maxsize=4096)(_form)


def _plain_bits(grid: Grid, shape: tuple[int, int]) -> int:
    """Bits of a code; 0 where codes are floats and stay as they are."""
    if isinstance(grid, Lattice):
        return grid.bits * grid.parts + grid.step
    known: Any = grid
    known = getattr(known, "base", known)  # an indexed grid
    known = getattr(known, "levels", known)
    if hasattr(known, "bits"):
        return int(known.bits)
    dtype = grid.code_spec(shape).dtype
    return 0 if dtype.is_floating_point else torch.iinfo(dtype).bits


def table_of(grid: Grid) -> Tensor | None:
    """The levels of a grid with a table, float32 [2^bits], padded with zeros; None for integers."""
    levels = getattr(grid, "levels", None)
    if not isinstance(levels, Table):
        return None
    table = torch.zeros(2 ** max(levels.bits, 2))
    table[: len(levels.numbers)] = torch.tensor(levels.numbers, dtype=torch.float32)
    return table


def buffer_specs(grid: Grid, shape: tuple[int, int]) -> dict[str, Spec]:
    """Names, shapes and dtypes of the buffers that a packed matrix of this grid and shape has.

    What a module needs to make empty buffers before it loads stored ones.
    """
    form = form_of(grid, shape)
    schema = grid.schema(shape)
    if form.kind is Kind.PLAIN:
        spec = grid.code_spec(shape)
        n = 1
        for size in spec.shape:
            n *= size
        codes = Spec((-(-n // 8), form.bits), torch.uint8) if form.bits else spec
        return {"codes": codes, **schema}
    if form.kind is Kind.ROWS:
        return {"codes": Spec((form.rows, form.padded * form.bits // 8), torch.uint8), **schema}
    specs = {"codes": Spec((form.tiles, form.padded * form.bits * LANES // 8), torch.uint8)}
    for name, spec in schema.items():
        specs[name] = Spec((form.tiles, form.groups, LANES), spec.dtype)
    table = table_of(grid)
    if table is not None:
        specs["table"] = Spec(tuple(table.shape), table.dtype)
    return specs
