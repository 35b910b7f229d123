"""The kernels as operators of torch, in the namespace `whit`, so that torch.compile and torch.export see through them.

A signature holds tensors and numbers only. Every operator that reads a packed matrix takes the same twelve arguments
for it: codes, scale, offset (uint8: zero points, float: minima), table, columns and beside (numbers beside the codes),
rows, cols, bits, group, zero, unit (form.py).
Plain matrices have no kernel: one operator decodes them, and its grid travels by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from whit.grids.grid import Grid
from whit.grids.named import grid_name, grid_named
from whit.kernels import library, reference
from whit.kernels.packed import Packed, unpack

_MATRIX = (
    "Tensor codes, Tensor? scale, Tensor? offset, Tensor? table, Tensor? columns, Tensor? beside, "
    "int rows, int cols, int bits, int group, int zero, float unit"
)
_LIBRARY = torch.library.Library("whit", "DEF")
_LIBRARY.define(f"linear(Tensor x, Tensor? bias, {_MATRIX}) -> Tensor")
_LIBRARY.define(f"linear_int8(Tensor x, Tensor x_scale, Tensor? bias, ScalarType dtype, {_MATRIX}) -> Tensor")
_LIBRARY.define("quantize_rows(Tensor x) -> (Tensor, Tensor)")
_LIBRARY.define(f"dequantize(ScalarType dtype, {_MATRIX}) -> Tensor")
_LIBRARY.define(f"rows(Tensor index, ScalarType dtype, {_MATRIX}) -> Tensor")
_LIBRARY.define("decode(Tensor codes, Tensor[] params, str grid, int rows, int cols) -> Tensor")

# Grids that no name stands for, by their printed form: an operator's argument cannot be a grid.
_GRIDS: dict[str, Grid] = {}


def name_of(grid: Grid) -> str:
    """What stands for a grid in an operator's arguments; grids without a name are remembered by their printed form."""
    name = grid_name(grid)
    _GRIDS.setdefault(name, grid)
    return name


def _linear(x: Tensor, bias: Tensor | None, *matrix: Any) -> Tensor:
    if library.NATIVE is not None and x.is_cpu and matrix[0].is_cpu and x.dtype in library.FLOATS:
        return library.NATIVE.linear(x, bias, matrix, library.pointers_of(matrix))
    gpu = _triton(x)
    if gpu is not None and 0 < x.numel() // x.shape[-1] <= gpu.MOST and x.dtype in gpu.FLOATS:
        return cast(Tensor, gpu.linear(x, bias, None, x.dtype, *matrix))
    return reference.linear(x, reference.dequantize(*matrix), bias)


def _linear_int8(x: Tensor, x_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, *matrix: Any) -> Tensor:
    if library.NATIVE is not None and x.is_cpu and matrix[0].is_cpu:
        return library.NATIVE.linear_int8(x, x_scale, bias, dtype, matrix, library.pointers_of(matrix))
    gpu = _triton(x)
    if gpu is not None and 0 < x.numel() // x.shape[-1] <= gpu.MOST:
        return cast(Tensor, gpu.linear(x, bias, x_scale, dtype, *matrix))
    if on_gpu(x):
        found = reference.linear_of_integers(x, x_scale, bias, dtype, *matrix)
        if found is not None:
            return found
    return reference.linear_int8(x, x_scale, reference.dequantize(*matrix), bias, dtype)


def on_gpu(x: Tensor) -> bool:
    """Whether products with x run on a GPU."""
    return x.is_cuda


def _triton(x: Tensor) -> ModuleType | None:
    """The products in Triton where they can run; torch's builds for GPUs bring it, except on Windows."""
    return _gpu() if on_gpu(x) else None


@cache
def _gpu() -> ModuleType | None:
    try:
        found = import_module("whit.kernels.gpu")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
    return found if found.usable() else None


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if library.NATIVE is not None and x.is_cpu and x.dtype in library.FLOATS:
        return library.NATIVE.quantize_rows(x)
    return reference.quantize_rows(x)


def _dequantize(dtype: torch.dtype, *matrix: Any) -> Tensor:
    if library.NATIVE is not None and matrix[0].is_cpu and dtype in library.FLOATS:
        return library.NATIVE.dequantize(dtype, *matrix)
    return reference.dequantize(*matrix).to(dtype)


def _rows(index: Tensor, dtype: torch.dtype, *matrix: Any) -> Tensor:
    codes, scale, offset, table, columns, beside, rows, cols, bits, group, zero, unit = matrix
    if library.NATIVE is not None and index.is_cpu and matrix[0].is_cpu and dtype in library.FLOATS:
        return library.NATIVE.rows(index, dtype, *matrix)
    if scale is None:
        few, at = index.reshape(-1), torch.arange(index.numel(), device=index.device)
        codes, table = codes[few], table if len(table) == 1 else table[few]
        columns, beside = (None if each is None else each[few] for each in (columns, beside))
    else:  # the tiles of these rows alone
        of_row, lane = index.reshape(-1) // 16, index.reshape(-1) % 16
        at = torch.arange(index.numel(), device=index.device) * 16 + lane
        codes, scale = codes[of_row], _select(scale, of_row)
        offset = None if offset is None else _select(offset, of_row)
        rows = 16 * index.numel()
    if scale is None:
        rows = index.numel()
    found = reference.dequantize(codes, scale, offset, table, columns, beside, rows, cols, bits, group, zero, unit)
    return found[at].view(*index.shape, cols).to(dtype)


def _select(value: Tensor, index: Tensor) -> Tensor:
    """Rows of a tensor of any dtype; 8-bit floats have no indexing of their own."""
    return value.view(torch.uint8)[index].view(value.dtype) if value.dtype.itemsize == 1 else value[index]


def _decode(codes: Tensor, params: Sequence[Tensor], name: str, rows: int, cols: int) -> Tensor:
    grid = _GRIDS.get(name) or grid_named(name)
    schema = grid.schema((rows, cols))
    buffers = {"codes": codes, **dict(zip(schema, params, strict=True))}
    return unpack(Packed(grid, (rows, cols), buffers)).dequantize()


for _name, _function in {
    "linear": _linear,
    "linear_int8": _linear_int8,
    "quantize_rows": _quantize_rows,
    "dequantize": _dequantize,
    "rows": _rows,
    "decode": _decode,
}.items():
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _function, "CUDA")


# What torch.compile needs: shapes and dtypes alone.


@torch.library.register_fake("whit::linear", lib=_LIBRARY)
def _fake_linear(x: Tensor, bias: Tensor | None, *matrix: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], library.shape_of(matrix)[0])


@torch.library.register_fake("whit::linear_int8", lib=_LIBRARY)
def _fake_linear_int8(x: Tensor, x_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, *matrix: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], library.shape_of(matrix)[0], dtype=dtype)


@torch.library.register_fake("whit::quantize_rows", lib=_LIBRARY)
def _fake_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.register_fake("whit::dequantize", lib=_LIBRARY)
def _fake_dequantize(dtype: torch.dtype, *matrix: Any) -> Tensor:
    return matrix[0].new_empty(library.shape_of(matrix), dtype=dtype)


@torch.library.register_fake("whit::rows", lib=_LIBRARY)
def _fake_rows(index: Tensor, dtype: torch.dtype, *matrix: Any) -> Tensor:
    return index.new_empty(*index.shape, library.shape_of(matrix)[1], dtype=dtype)


@torch.library.register_fake("whit::decode", lib=_LIBRARY)
def _fake_decode(codes: Tensor, params: Sequence[Tensor], grid: str, rows: int, cols: int) -> Tensor:
    return codes.new_empty(rows, cols, dtype=torch.float32)


# Gradients reach x alone: the weights are frozen.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *matrix = inputs
    tensors, ctx.numbers = matrix[: library.N_TENSORS], matrix[library.N_TENSORS :]
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    present = iter(ctx.saved_tensors)
    tensors = [next(present) if there else None for there in ctx.present]
    weight = torch.ops.whit.dequantize.default(grad.dtype, *tensors, *ctx.numbers)
    grad_x = grad @ weight
    grad_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if grad.dim() > 1 else grad.to(ctx.bias_dtype)
    return grad_x, grad_bias, *(None,) * (len(ctx.present) + len(ctx.numbers))


torch.library.register_autograd("whit::linear", _backward, setup_context=_save, lib=_LIBRARY)


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with weight and bias in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
