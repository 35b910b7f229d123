"""Products with packed matrices: activations as they are, or in 8-bit integers.

The obvious version, decode and call F.linear, reads the decoded weights as well: for one token at a time that is two to
eight times the bytes, and bytes are what such a product costs. Here codes are decoded in registers. Where many tokens
share the weights it pays to decode a slab of rows first and let torch multiply (library.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.grids.sparse import COLUMNS, VALUES
from whit.kernels import library, ops
from whit.kernels.form import Form, Kind
from whit.kernels.library import Matrix
from whit.kernels.packed import Packed


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x times the transposed matrix, plus the bias.

    x       [..., cols] float32, bfloat16 or float16
    bias    [rows], any float dtype
    Returns [..., rows] in x.dtype. Weights take their stored values, sums run in float32 (in torch's own way where it
    multiplies: x of more than a few rows). Gradients flow to x and to the bias.
    """
    if unwatched(x) and (ready := _ready(packed)) and library.NATIVE is not None and x.dtype in library.FLOATS:
        return library.NATIVE.linear(x, bias, *ready)
    form = packed.form
    if form.kind is Kind.PLAIN:
        return ops.plain_linear(x, _decoded(packed), bias)
    return torch.ops.whit.linear.default(x, bias, *_matrix(packed, form))


def linear_int8(
    x: Tensor, scale: Tensor, packed: Packed, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(scale * x) times the transposed matrix, plus the bias; integer levels are summed as integers.

    x      int8 [..., cols], codes of activations (as `quantize_rows` makes them)
    scale  float32, [..., 1] for each row of x, or one for all
    bias   [rows], any float dtype
    Returns [..., rows] in `dtype`.
    """
    if unwatched(x) and (ready := _ready(packed)) and library.NATIVE is not None:
        return library.NATIVE.linear_int8(x, scale, bias, dtype, *ready)
    form = packed.form
    if form.kind is Kind.PLAIN:
        y = torch.nn.functional.linear(x.float(), _decoded(packed)) * scale
        return (y if bias is None else y + bias).to(dtype)
    return torch.ops.whit.linear_int8.default(x, scale, bias, dtype, *_matrix(packed, form))


def linear_rounded(x: Tensor, scale: Tensor | None, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`linear_int8` of x put in int8, with one scale or with those of `quantize_rows`: the same bits, in one call for a
    few rows.

    x      [..., cols] float32, bfloat16 or float16
    scale  float32, one number; codes are x / scale, halves to even, from -127 to 127. None for one a row
    Returns [..., rows] in x.dtype.
    """
    if unwatched(x) and (scale is None or (scale.is_cpu and scale.dtype == torch.float32)):
        few = 0 < x.numel() < library.MANY_TILED * x.shape[-1] and x.dtype in library.FLOATS
        if few and library.NATIVE is not None and (ready := _ready(packed)):
            return library.NATIVE.linear_rounded(x, scale, bias, *ready)
    if scale is None:
        return linear_int8(*quantize_rows(x), packed, bias, x.dtype)
    codes = (x.float() / scale).round_().clamp_(-127, 127).to(torch.int8)
    return linear_int8(codes, scale, packed, bias, x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 and scales float32 [..., 1] of rows: symmetric, scale = largest magnitude / 127, halves to even.

    x  [..., cols] float32, bfloat16 or float16
    A row of zeros has scale 1 and codes 0.
    """
    if library.NATIVE is not None and unwatched(x) and x.dtype in library.FLOATS:
        return library.NATIVE.quantize_rows(x)
    return torch.ops.whit.quantize_rows.default(x)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, cols] in dtype; in float32 equal to `unpack(packed).dequantize()`, bit for bit."""
    form = packed.form
    if form.kind is Kind.PLAIN:
        return _decoded(packed).to(dtype)
    return torch.ops.whit.dequantize.default(dtype, *_matrix(packed, form))


def rows(packed: Packed, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows that `index` (integers, any shape) names, [*index.shape, cols] in dtype; only those are decoded.

    Raises IndexError for an index that is not a row.
    """
    if unwatched(index) and (ready := _ready(packed)) and library.NATIVE is not None and dtype in library.FLOATS:
        return library.NATIVE.rows(index, dtype, *ready[0])
    form = packed.form
    if form.kind is Kind.PLAIN:
        return _decoded(packed)[index].to(dtype)
    return torch.ops.whit.rows.default(index, dtype, *_matrix(packed, form))


def native() -> str:
    """Which native code is used: "avx512-vnni" (", four tiles" on others than AMD's), "avx2", "neon", "generic", or
    "none" without any."""
    return "none" if library.NATIVE is None else library.NATIVE.name


def unwatched(x: Tensor) -> bool:
    """Whether nothing but a product's numbers is asked for, so that torch need not know of it.

    Its dispatcher takes longer than a small product, and much longer when a large one has just emptied the caches.
    Gradients, compilers, traces, modes and transformations (`torch.func`) need the operator.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _ready(packed: Packed) -> tuple[Matrix, library.Pointers] | None:
    """A matrix's tensors and where they are, remembered as long as they are there; None where there is no
    kernel for them."""
    known = packed.__dict__.get("_ready")
    at = [buffer.data_ptr() for buffer in packed.buffers.values()]
    if known is None or known[0] != at:
        form = packed.form
        there = form.kind is not Kind.PLAIN and packed.buffers["codes"].is_cpu
        matrix = _matrix(packed, form) if there else None
        known = at, None if matrix is None else (matrix, library.pointers_of(matrix))
        packed.__dict__["_ready"] = known
    found: tuple[Matrix, library.Pointers] | None = known[1]
    return found


def _matrix(packed: Packed, form: Form) -> Matrix:
    """The arguments of the operators for one matrix."""
    buffers = packed.buffers
    if form.kind is Kind.ROWS:
        return (
            buffers["codes"], None, None, buffers["levels"], buffers.get(COLUMNS), buffers.get(VALUES),
            form.rows, form.cols, form.bits, form.group, form.zero, form.unit,
        )  # fmt: skip
    offset = buffers.get("zero")
    return (
        buffers["codes"], buffers["scale"], buffers.get("minimum") if offset is None else offset, buffers.get("table"),
        None, None, form.rows, form.cols, form.bits, form.group, form.zero, form.unit,
    )  # fmt: skip


def _decoded(packed: Packed) -> Tensor:
    """[rows, cols] float32 of a plain matrix."""
    params = [packed.buffers[name] for name in packed.grid.schema(packed.shape)]
    return torch.ops.whit.decode.default(packed.buffers["codes"], params, ops.name_of(packed.grid), *packed.shape)
