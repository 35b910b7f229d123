"""The kernels in plain torch: the meaning of the native ones, and what runs where those are not built.

They take what the operators take (ops.py): buffers and numbers, no grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from whit.kernels.packed import unpack_rows, unpack_tiles, untile_params


def dequantize(
    codes: Tensor, scale: Tensor | None, offset: Tensor | None, table: Tensor | None, columns: Tensor | None,
    beside: Tensor | None, rows: int, cols: int, bits: int, group: int, zero: int, unit: float,
) -> Tensor:  # fmt: skip
    """[rows, cols] float32, in the grid's own order of operations."""
    if scale is None:
        assert table is not None
        first = torch.arange(cols, device=codes.device) // group << bits  # of the levels of a column's group
        levels = table.float().expand(rows, -1).gather(1, unpack_rows(codes, cols, bits) + first)
        if columns is None or beside is None:
            return levels
        return levels.scatter_add_(1, columns.long(), beside.float())
    index = unpack_tiles(codes, rows, cols, bits)
    if table is None:
        levels = index.float().sub_(zero)
    else:
        levels = table.index_select(0, index.view(-1).int()).view(index.shape)
    levels = levels.view(rows, -1, min(group, cols))  # a group that is a row may be longer, with what pads it
    factor = untile_params(scale, rows).float()[..., None]
    if unit != 1:
        factor = factor * unit
    shift = None if offset is None else untile_params(offset, rows).float()[..., None]
    if shift is not None and offset is not None and offset.dtype == torch.uint8:
        levels = levels - shift
    levels = levels * factor
    if shift is not None and offset is not None and offset.dtype != torch.uint8:
        levels = levels + shift
    return levels.reshape(rows, cols)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., cols] @ weight [rows, cols] float32, transposed, in x.dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear_int8(x: Tensor, x_scale: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x_scale * (x [..., cols] int8 @ weight [rows, cols] float32, transposed) + bias, in dtype."""
    y = F.linear(x.float(), weight) * x_scale.float()
    return (y if bias is None else y + bias.float()).to(dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scales [..., 1] of rows, symmetric; a row of zeros has scale 1."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127)
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def linear_of_integers(
    x: Tensor, x_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
    codes: Tensor, scale: Tensor | None, offset: Tensor | None, table: Tensor | None, columns: Tensor | None,
    beside: Tensor | None, rows: int, cols: int, bits: int, group: int, zero: int, unit: float,
) -> Tensor | None:  # fmt: skip
    """As `linear_int8`, in torch's own product of int8 matrices with int32 sums; None where it cannot be used.

    It can for integer levels with one scale per row, for more than sixteen rows of x and multiples of eight rows and
    columns (what cuBLAS asks for).
    """
    m = x.numel() // cols
    whole = scale is not None and scale.shape[1] == 1 and table is None
    if not whole or scale is None or m <= 16 or rows % 8 or cols % 8:
        return None
    middle = 1 << (bits - 1)  # codes less this fit into int8, whatever their zero point is
    flat = x.reshape(m, cols)
    levels = (unpack_tiles(codes, rows, cols, bits).short() - middle).to(torch.int8)
    sums = flat.sum(1, dtype=torch.int32)[:, None]
    above = torch.tensor(zero - middle, dtype=torch.int32, device=x.device)
    if offset is not None and offset.dtype == torch.uint8:
        above = above + untile_params(offset, rows).int().T
    # integers to the end: a zero point far from the middle cancels most of both terms
    y = (torch._int_mm(flat.contiguous(), levels.T) - sums * above).float() * (
        untile_params(scale, rows).float() * unit
    ).T
    if offset is not None and offset.dtype != torch.uint8:
        y = y + sums.float() * untile_params(offset, rows).float().T
    y = y * (x_scale.float() if x_scale.numel() == 1 else x_scale.float().reshape(m, 1))
    return (y if bias is None else y + bias.float()).to(dtype).view(*x.shape[:-1], rows)
