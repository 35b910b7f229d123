"""Products with packed matrices on a GPU, in Triton: a few rows of x, codes decoded in registers.

Torch's builds for GPUs bring Triton; what it compiles reads the same buffers as the processor's kernels, so that
nothing is packed anew when a model moves. A program takes some rows of the matrix and a share of its columns; the
shares are summed afterwards, in a fixed order. For more than `MOST` rows of x the matrix is decoded once and torch
multiplies.

Tested under Triton's interpreter (tests/kernels/test_gpu.py), compiled for compute capability 8.0 and 9.0.
"""

from __future__ import annotations

import subprocess
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

from whit.kernels.form import LANES, ROW_BLOCKS, block_of

MOST = 8  # rows of x
TILE_ROWS, BLOCKS = 32, 8  # rows of the matrix a program takes, blocks of columns at a time
TABLE_ROWS, STEPS = 8, 64  # the same for tables of levels, and columns of a field at a time
PROGRAMS = 528  # at least about so many where the matrix has as much: four for each processor of the largest devices
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _tiles(
    x, codes, scale, offset, table, out, m, rows, cols, groups, blocks, group_blocks, share, zero, unit,
    BITS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, TABLE: tl.constexpr,
    M: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out [shares, m, rows] float32, of the tile form; codes are read as words of four columns per lane and field."""
    words = BLOCK * BITS // 2  # of a block of sixteen rows
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile, lane, there = (row // 16)[None, :], (row % 16)[None, :], (row < rows)[None, :]
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, blocks)
    of_x = tl.arange(0, M)
    total = tl.zeros([M, BLOCKS, ROWS], tl.float32)
    for start in range(first, last, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = (block < last)[:, None] & there
        at = (tile * blocks + block[:, None]).to(tl.int64) * words + lane
        found = tl.zeros([M, BLOCKS, ROWS], tl.float32)
        sums = tl.zeros([M, BLOCKS], tl.float32)
        of_group = (tile * groups + (block // group_blocks)[:, None]) * 16 + lane
        shift = tl.zeros([BLOCKS, ROWS], tl.float32) + zero
        if OFFSET == 1:  # the zero point of the group
            shift += tl.load(offset + of_group, mask=inside, other=0).to(tl.float32)
        for quad in tl.static_range(BLOCK // 4):
            low = tl.zeros([BLOCKS, ROWS], tl.int32)  # the words of this quad, plane by plane
            middle = tl.zeros([BLOCKS, ROWS], tl.int32)
            high = tl.zeros([BLOCKS, ROWS], tl.int32)
            # Planes of 8, 4, 2 and 1 bits, in this order: the first holds the lowest bits.
            if BITS == 8:
                low = tl.load(codes + at + quad * 16, mask=inside, other=0)
            if BITS & 4:
                low = tl.load(codes + at + (quad // 2) * 16, mask=inside, other=0) >> (4 * (quad % 2))
            if BITS & 2:
                middle = tl.load(codes + at + (BITS & 4) * (BLOCK // 2) + (quad // 4) * 16, mask=inside, other=0)
                middle = middle >> (2 * (quad % 4))
            if (BITS & 1) != 0:
                high = tl.load(codes + at + (BITS & 6) * (BLOCK // 2) + (quad // 8) * 16, mask=inside, other=0)
                high = high >> (quad % 8)
            for byte in tl.static_range(4):
                if BITS == 8:
                    code = (low >> (8 * byte)) & 255
                else:
                    code = tl.zeros([BLOCKS, ROWS], tl.int32)
                    if BITS & 4:
                        code = (low >> (8 * byte)) & 15
                    if BITS & 2:
                        code |= ((middle >> (8 * byte)) & 3) << (BITS & 4)
                    if (BITS & 1) != 0:
                        code |= ((high >> (8 * byte)) & 1) << (BITS & 6)
                if TABLE:  # noqa: SIM108 - decided while compiling
                    level = tl.load(table + code, mask=inside, other=0.0)
                else:
                    level = code.to(tl.float32)
                level -= shift
                column = block * BLOCK + quad * 4 + byte
                known = (of_x < m)[:, None] & ((column < cols) & (block < last))[None, :]
                value = tl.load(x + of_x[:, None] * cols + column[None, :], mask=known, other=0.0).to(tl.float32)
                found += value[:, :, None] * level[None, :, :]
                if OFFSET == 2:
                    sums += value
        factor = tl.load(scale + of_group, mask=inside, other=0.0).to(tl.float32) * unit
        total += found * factor[None, :, :]
        if OFFSET == 2:
            minimum = tl.load(offset + of_group, mask=inside, other=0.0).to(tl.float32)
            total += sums[:, :, None] * minimum[None, :, :]
    y = tl.sum(total, 1)
    of_out = (tl.program_id(1) * m + of_x[:, None]) * rows + row[None, :]
    tl.store(out + of_out, y, mask=(of_x < m)[:, None] & there)


@triton.jit
def _tables(
    x, codes, table, out, m, rows, cols, step, share, group,
    BITS: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """out [shares, m, rows] float32, of the row form; `step` levels lie between the tables of two rows."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    SIZE: tl.constexpr = BLOCK if BITS == 8 else 24 if BITS == 3 else 16  # bytes of a block
    FIELDS: tl.constexpr = 1 if BITS == 8 else 8 // WIDTH
    BYTES: tl.constexpr = BLOCK if BITS == 8 else 16  # with the low bits
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    blocks = tl.cdiv(cols, BLOCK)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, blocks)
    of_x = tl.arange(0, M)
    total = tl.zeros([M, ROWS, STEPS], tl.float32)
    for start in range(first, last, STEPS // BYTES):
        block = start + tl.arange(0, STEPS) // BYTES
        at = tl.arange(0, STEPS) % BYTES
        in_row = row.to(tl.int64)[:, None] * (blocks * SIZE)
        low = tl.load(codes + in_row + (block * SIZE + at)[None, :], mask=there & (block < last)[None, :], other=0)
        for field in tl.static_range(FIELDS):
            within = field * BYTES + at
            column = block * BLOCK + within
            inside = (block < last) & (column < cols)
            code = (low.to(tl.int32) >> (WIDTH * field)) & ((1 << WIDTH) - 1)
            if BITS == 3:
                bits = in_row + (block * SIZE + 16 + within // 8)[None, :]
                high = tl.load(codes + bits, mask=there & inside[None, :], other=0).to(tl.int32)
                code |= ((high >> (within % 8)[None, :]) & 1) << 2
            of_level = row.to(tl.int64)[:, None] * step + ((column // group) << BITS)[None, :] + code
            level = tl.load(table + of_level, mask=there & inside[None, :], other=0.0).to(tl.float32)
            known = (of_x < m)[:, None] & inside[None, :]
            value = tl.load(x + of_x[:, None] * cols + column[None, :], mask=known, other=0.0).to(tl.float32)
            total += value[:, None, :] * level[None, :, :]
    y = tl.sum(total, 2)
    of_out = (tl.program_id(1) * m + of_x[:, None]) * rows + row[None, :]
    tl.store(out + of_out, y, mask=(of_x < m)[:, None] & (row < rows)[None, :])


def linear(
    x: Tensor, bias: Tensor | None, x_scale: Tensor | None, dtype: torch.dtype,
    codes: Tensor, scale: Tensor | None, offset: Tensor | None, table: Tensor | None, columns: Tensor | None,
    beside: Tensor | None, rows: int, cols: int, bits: int, group: int, zero: int, unit: float,
) -> Tensor:  # fmt: skip
    """x, times x_scale where there is one, times the transposed matrix, plus the bias.

    x        [..., cols] float32, bfloat16, float16 or int8, at most MOST rows
    bias     [rows], any float dtype
    x_scale  [..., 1] or a number, float32
    The matrix is given as to every operator (ops.py). Returns [..., rows] in `dtype`; sums run in float32.
    """
    flat = x.reshape(-1, cols).contiguous()
    m = flat.shape[0]
    with torch.cuda.device_of(x):  # Triton runs where the current device is
        if scale is None:
            assert table is not None
            y = _of_tables(flat, codes, table, rows, cols, bits, group)
        else:
            y = _of_tiles(flat, codes, scale, offset, table, rows, cols, bits, group, zero, unit)
    if columns is not None and beside is not None:
        y += (flat.float()[:, columns.long()] * beside.float()).sum(-1)
    if x_scale is not None:
        y = y * (x_scale.float() if x_scale.numel() == 1 else x_scale.float().reshape(m, 1))
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype).view(*x.shape[:-1], rows)


def _of_tiles(
    x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None,
    rows: int, cols: int, bits: int, group: int, zero: int, unit: float,
) -> Tensor:  # fmt: skip
    """[m, rows] float32."""
    block = block_of(bits)
    blocks = -(-cols // block)
    share, shares = _shares(-(-rows // TILE_ROWS), blocks, BLOCKS)
    out = x.new_empty((shares, x.shape[0], rows), dtype=torch.float32)
    if scale.dtype.itemsize == 1:  # an 8-bit float that not every device can read
        scale = scale.float()
    kind = 0 if offset is None else 1 if offset.dtype == torch.uint8 else 2
    _tiles[-(-rows // TILE_ROWS), shares](
        x, codes.view(torch.int32), scale, scale if offset is None else offset, scale if table is None else table, out,
        x.shape[0], rows, cols, blocks * block // group, blocks, group // block, share, 0 if zero < 0 else zero, unit,
        BITS=bits, BLOCK=block, OFFSET=kind, TABLE=table is not None,
        M=triton.next_power_of_2(x.shape[0]), ROWS=TILE_ROWS, BLOCKS=BLOCKS,
    )  # fmt: skip
    return out[0] if shares == 1 else out.sum(0)


def _of_tables(x: Tensor, codes: Tensor, table: Tensor, rows: int, cols: int, bits: int, group: int) -> Tensor:
    """[m, rows] float32."""
    block = ROW_BLOCKS[bits]
    at_once = STEPS // (block if bits == 8 else LANES)
    share, shares = _shares(-(-rows // TABLE_ROWS), -(-cols // block), at_once)
    out = x.new_empty((shares, x.shape[0], rows), dtype=torch.float32)
    _tables[-(-rows // TABLE_ROWS), shares](
        x, codes, table, out, x.shape[0], rows, cols, 0 if len(table) == 1 else table.shape[1], share, group,
        BITS=bits, BLOCK=block, M=triton.next_power_of_2(x.shape[0]), ROWS=TABLE_ROWS, STEPS=STEPS,
    )  # fmt: skip
    return out[0] if shares == 1 else out.sum(0)


def _shares(programs: int, blocks: int, at_once: int) -> tuple[int, int]:
    """Blocks of columns of one share, a multiple of what a program takes at once, and how many shares there are."""
    wanted = max(1, min(-(-PROGRAMS // max(1, programs)), blocks // at_once))
    share = -(-blocks // wanted // at_once) * at_once
    return share, -(-blocks // share)


def usable() -> bool:
    """Whether Triton can run here: it compiles a small program of its own first, which needs a C compiler."""
    try:
        triton.runtime.driver.active.get_current_target()
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"Triton does not run here, so matrices are decoded for every product: {error}", stacklevel=2)
        return False
    return True
