"""Nearest rounding of a whole matrix in one pass of the compiled library: the range rule of integer levels.

What `grid.fit`, `grid.round` and `grid.store` make of a matrix in a dozen passes over slices, here from the numbers of
the checkpoint to codes, on all threads. The same bits, and None for whatever else there is to round: torch does that.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from whit.grids.grid import Grid, Params
from whit.grids.levels import Integers
from whit.grids.scaled import Offset, PerGroup, PerTensor, Scaled
from whit.grids.superblock import SIZE, Superblock
from whit.native import LIBRARY

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in kernels/native/whit.h
OFFSETS = {Offset.NONE: 0, Offset.ZERO_POINT: 1, Offset.MINIMUM: 2}

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_GROUPS = (_P, _I, _L, _L, _I, _I, _I, _I, _P, _I, _P, _P, _I)
_SUPERBLOCKS = (_P, _I, _L, *(_I,) * 6, *(_P,) * 5, _I)


def nearest_codes(W: Tensor, grid: Grid) -> tuple[Tensor, Params] | None:
    """Codes and stored parameters of W [rows, cols] (float32, bfloat16 or float16) on a grid.

    None where the library or a function for this grid is missing, and where weights are not finite or scales do not fit
    what they are stored in, so that whoever asks finds out. Raises ValueError when cols does not fit the grid's spans.
    """
    if LIBRARY is None or W.device.type != "cpu" or W.dtype not in TYPES or not W.numel():
        return None
    if not isinstance(grid, Scaled | Superblock) or not isinstance(grid.levels, Integers):
        return None
    rows, cols = W.shape
    schema, codes = grid.schema((rows, cols)), torch.empty(rows, cols, dtype=torch.uint8)
    W, levels, threads = W.contiguous(), grid.levels, torch.get_num_threads()
    top = 2**levels.bits - 1
    if isinstance(grid, Superblock):
        if levels.mirrored:
            return None
        params = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in schema.items()}
        pointers = [_pointer(params.get(name)) for name in ("scale", "sub_scale", "minimum", "sub_minimum")]
        good = _function("whit_nearest_superblocks", _SUPERBLOCKS)(
            W.data_ptr(), TYPES[W.dtype], W.numel() // SIZE, grid.sub, levels.zero, top, grid.low, grid.high,
            int(grid.minimum), codes.data_ptr(), *pointers, threads,
        )  # fmt: skip
        return (codes, params) if good else None
    if grid.unit != 1 or grid.scale_dtype not in TYPES or isinstance(grid.scheme, PerTensor):
        return None
    size = grid.scheme.size if isinstance(grid.scheme, PerGroup) else cols
    params = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in schema.items()}
    offset = next((each for name, each in params.items() if name != "scale"), None)
    good = _function("whit_nearest_groups", _GROUPS)(
        W.data_ptr(), TYPES[W.dtype], W.numel() // size, size, OFFSETS[grid.offset], levels.zero, top,
        int(levels.mirrored), codes.data_ptr(), TYPES[grid.scale_dtype], params["scale"].data_ptr(), _pointer(offset),
        threads,
    )  # fmt: skip
    return (codes, params) if good else None


def _function(name: str, arguments: tuple[type, ...]) -> ctypes._NamedFuncPointer:
    function: ctypes._NamedFuncPointer = getattr(LIBRARY, name)
    function.argtypes, function.restype = arguments, _I
    return function


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
