"""The native products: what the compiled library (native.py) takes, which is pointers and the number of threads.

Its threads are torch's: both ask for libgomp.so.1, and the one that torch brought is already there.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from whit import products
from whit.native import LIBRARY

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCALES = {**FLOATS, torch.float8_e8m0fnu: 3, torch.float8_e4m3fn: 4}

# Rows of x from which decoding a slab of weights and multiplying it in torch is faster (docs/kernels.md).
MANY = {torch.float32: 96, torch.bfloat16: 32, torch.float16: 64}
MANY_FLOAT32_ONEDNN = 24  # where products.linear takes oneDNN
# The same where the processor has tile units, which unpack a tile of weights once for all of x.
MANY_TILED = 12
# Decoded weights that stay in the cache between writing and reading.
SLAB_BYTES = 1 << 22

# A packed matrix as operators take it: codes, scale, offset, table, columns, beside; rows, cols, bits, group, zero,
# unit.
Matrix = tuple[
    Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int, int, int, int, float
]
N_TENSORS = 6  # with which it begins

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class Pointers(ctypes.Structure):
    """A packed matrix as the library takes it (`Given` of native/host.h), while its tensors stay there."""

    _fields_ = (
        ("codes", _P), ("scale", _P), ("offset", _P), ("table", _P), ("columns", _P), ("beside", _P),
        ("book_step", _L), ("count", _L), ("rows", _L), ("cols", _L), ("group", _L),
        ("scale_type", _I), ("offset_kind", _I), ("column_bytes", _I), ("bits", _I), ("zero", _I),
        ("unit", ctypes.c_float),
    )  # fmt: skip


_M = ctypes.POINTER(Pointers)
_SIGNATURES = {
    "whit_linear": (_P, _L, _P, _P, _I, _I, _M),
    "whit_linear_rounded": (_P, _L, _P, _P, _P, _I, _I, _M),
    "whit_linear_int8": (_P, _L, _P, _L, _P, _P, _I, _I, _M),
    "whit_linear_many": (_P, _L, _P, _P, _I, _I, _M),
    "whit_linear_int8_many": (_P, _L, _P, _L, _P, _P, _I, _I, _M),
    "whit_quantize_rows": (_P, _L, _L, _P, _P, _I, _I),
    "whit_dequantize": (_L, _L, _P, _I, _I, _M),
    "whit_rows": (_P, _L, _P, _I, _I, _M),
}


class Native:
    """The loaded library. Every function takes what the operator of its name takes (ops.py)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, _I if name.endswith("many") else None
        self.library.whit_name.restype = ctypes.c_char_p
        self.library.whit_choose.argtypes = (ctypes.c_char_p,)
        self._linear = self.library.whit_linear
        self._linear_int8 = self.library.whit_linear_int8

    @property
    def name(self) -> str:
        """The instruction set that is used."""
        return str(self.library.whit_name().decode())

    def choose(self, name: str) -> bool:
        """Use the kernels of this instruction set from now on; False where the processor lacks it. For tests."""
        return bool(self.library.whit_choose(name.encode()))

    def linear(self, x: Tensor, bias: Tensor | None, matrix: Matrix, pointers: Pointers) -> Tensor:
        """As `matmul.linear`.

        pointers  `pointers_of(matrix)`
        """
        rows, cols = shape_of(matrix)
        _check(x, bias, rows, cols)
        x = x.contiguous()
        m = x.numel() // cols
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        y = x.new_empty(*x.shape[:-1], rows)
        arguments = (
            x.data_ptr(), m, None if bias is None else bias.data_ptr(), y.data_ptr(), FLOATS[x.dtype],
            torch.get_num_threads(), pointers,
        )  # fmt: skip
        if m >= MANY_TILED:
            if self.library.whit_linear_many(*arguments):
                return y
            if m >= _many(x.dtype):
                return self._slabs(x, bias, matrix)
        if m:
            self._linear(*arguments)
        return y

    def linear_int8(
        self,
        x: Tensor,
        x_scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        matrix: Matrix,
        pointers: Pointers,
    ) -> Tensor:
        """As `matmul.linear_int8`; pointers as in `linear`."""
        rows, cols = shape_of(matrix)
        _check(x, bias, rows, cols)
        if x_scale.numel() not in (1, x.numel() // cols) or x.dtype != torch.int8:
            raise ValueError(
                f"x {x.dtype} {list(x.shape)} needs int8 and one scale or one a row, not {list(x_scale.shape)}"
            )
        x, x_scale = x.contiguous(), x_scale.float().contiguous()
        m = x.numel() // cols
        bias = None if bias is None else bias.to(dtype).contiguous()
        y = x.new_empty(*x.shape[:-1], rows, dtype=dtype)
        if m:
            function = self.library.whit_linear_int8_many if m >= MANY_TILED else self._linear_int8
            arguments = (
                x.data_ptr(), m, x_scale.data_ptr(), 0 if x_scale.numel() == 1 else 1,
                None if bias is None else bias.data_ptr(), y.data_ptr(), FLOATS[dtype],
                torch.get_num_threads(), pointers,
            )  # fmt: skip
            if function(*arguments) == 0:
                if m >= _many(torch.float32):  # levels that are no integers
                    wide = self._slabs(x.float(), None, matrix) * x_scale
                    return (wide if bias is None else wide + bias.float()).to(dtype)
                self._linear_int8(*arguments)
        return y

    def linear_rounded(
        self, x: Tensor, x_scale: Tensor | None, bias: Tensor | None, matrix: Matrix, pointers: Pointers
    ) -> Tensor:
        """As `matmul.linear_rounded`, for less than MANY_TILED rows of x; pointers as in `linear`."""
        rows, cols = shape_of(matrix)
        _check(x, bias, rows, cols)
        x = x.contiguous()
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        y = x.new_empty(*x.shape[:-1], rows)
        if x.numel():
            self.library.whit_linear_rounded(
                x.data_ptr(), x.numel() // cols, None if x_scale is None else x_scale.data_ptr(),
                None if bias is None else bias.data_ptr(), y.data_ptr(), FLOATS[x.dtype], torch.get_num_threads(),
                pointers,
            )  # fmt: skip
        return y

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `matmul.quantize_rows`."""
        x = x.contiguous()
        cols = x.shape[-1]
        q = torch.empty(x.shape, dtype=torch.int8)
        scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
        self.library.whit_quantize_rows(
            x.data_ptr(), x.numel() // cols if cols else 0, cols, q.data_ptr(), scale.data_ptr(), FLOATS[x.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        return q, scale

    def dequantize(self, dtype: torch.dtype, *matrix: *Matrix) -> Tensor:
        """As `matmul.dequantize`."""
        rows, cols = shape_of(matrix)
        out = torch.empty((rows, cols), dtype=dtype)
        self._decode(0, rows, out, matrix)
        return out

    def rows(self, index: Tensor, dtype: torch.dtype, *matrix: *Matrix) -> Tensor:
        """As `matmul.rows`."""
        rows, cols = shape_of(matrix)
        index = index.long().contiguous()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < rows:
            raise IndexError(f"a matrix of {rows} rows has no row {int(index.min())} or {int(index.max())}")
        out = torch.empty((*index.shape, cols), dtype=dtype)
        self.library.whit_rows(
            index.data_ptr(),
            index.numel(),
            out.data_ptr(),
            FLOATS[dtype],
            torch.get_num_threads(),
            pointers_of(matrix),
        )
        return out

    def _decode(self, first: int, last: int, out: Tensor, matrix: Matrix) -> None:
        self.library.whit_dequantize(
            first, last, out.data_ptr(), FLOATS[out.dtype], torch.get_num_threads(), pointers_of(matrix)
        )

    @torch.no_grad()  # the operators have gradients of their own
    def _slabs(self, x: Tensor, bias: Tensor | None, matrix: Matrix) -> Tensor:
        """Weights decoded to x's dtype, some rows at a time, and multiplied by torch."""
        rows, cols = shape_of(matrix)
        flat = x.view(-1, cols)
        y = x.new_empty((flat.shape[0], rows))
        step = max(1, SLAB_BYTES // (cols * x.element_size()) // 16) * 16
        slab = x.new_empty((min(step, rows), cols))
        pointers = pointers_of(matrix)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            part = slab[: last - first]
            self.library.whit_dequantize(
                first, last, part.data_ptr(), FLOATS[x.dtype], torch.get_num_threads(), pointers
            )
            y[:, first:last] = products.linear(flat, part, None if bias is None else bias[first:last])
        return y.view(*x.shape[:-1], rows)


def _many(dtype: torch.dtype) -> int:
    """Rows of x of `dtype` from which `_slabs` is faster."""
    return MANY_FLOAT32_ONEDNN if dtype == torch.float32 and products.mkl_is_slow() else MANY[dtype]


def _check(x: Tensor, bias: Tensor | None, rows: int, cols: int) -> None:
    """Raises ValueError for shapes that the kernels would read beyond."""
    if x.shape[-1] != cols or (bias is not None and bias.numel() != rows):
        of_bias = "" if bias is None else f" and a bias {list(bias.shape)}"
        raise ValueError(f"a matrix [{rows}, {cols}] cannot take x {list(x.shape)}{of_bias}")


def shape_of(matrix: Matrix) -> tuple[int, int]:
    """Rows and columns."""
    return matrix[6], matrix[7]


def pointers_of(matrix: Matrix) -> Pointers:
    """A matrix as the library takes it."""
    codes, scale, offset, table, columns, beside, rows, cols, bits, group, zero, unit = matrix
    step = 0 if scale is not None or table is None or len(table) == 1 else table.shape[1]  # one table of the matrix: 0
    optional = (scale, offset, table, columns, beside)
    return Pointers(
        codes.data_ptr(), *(None if each is None else each.data_ptr() for each in optional),
        step, 0 if beside is None else beside.shape[1], rows, cols, group,
        0 if scale is None else _SCALES[scale.dtype], 0 if offset is None else 1 if offset.dtype == torch.uint8 else 2,
        0 if columns is None else columns.itemsize, bits, zero, unit,
    )  # fmt: skip


NATIVE = None if LIBRARY is None else Native(LIBRARY)
