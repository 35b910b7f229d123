"""Attention of one token to all before it: what is left to do when the matrices are small.

    out = softmax(scale * q k^T + mask) v

torch's own for the CPU is made for many queries. For one, in 16 bits, it takes several times as long, and with a
thousand tokens before it more than all products of a block of 2048 columns together (docs/kernels.md).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from whit.kernels.library import FLOATS
from whit.native import LIBRARY

LANES = 16  # numbers of a head come in multiples of it
_P, _L = ctypes.c_void_p, ctypes.c_int64


class _Attention(ctypes.Structure):
    """`Attention` of native/attend.cpp."""

    _fields_ = (
        ("q", _P), ("k", _P), ("v", _P), ("mask", _P), ("out", _P),
        ("rows", _L), ("heads", _L), ("key_heads", _L), ("n", _L), ("width", _L), ("value_width", _L),
        ("k_row", _L), ("k_head", _L), ("k_token", _L), ("v_row", _L), ("v_head", _L), ("v_token", _L),
        ("type", ctypes.c_int), ("scale", ctypes.c_float),
    )  # fmt: skip


if LIBRARY is not None:
    LIBRARY.whit_attend.argtypes, LIBRARY.whit_attend.restype = (ctypes.POINTER(_Attention), ctypes.c_int), None


def _serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """One query, one float dtype, heads that share evenly, and whole lanes of numbers side by side."""
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    return (
        len(of_q) == len(of_k) == len(of_v) == 4
        and of_q[2] == 1
        and q.dtype in FLOATS
        and q.dtype is k.dtype is v.dtype
        and q.is_cpu and k.is_cpu and v.is_cpu
        and of_q[0] == of_k[0]
        and of_k[:3] == of_v[:3]
        and of_k.numel() > 0
        and of_q[1] % of_k[1] == 0
        and of_q[3] == of_k[3]
        and of_k[3] % LANES == 0 and of_v[3] % LANES == 0
        and k.stride(3) == 1 and v.stride(3) == 1
    )  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor | None:
    """Attention of one query of each head. Sums run in float32 and are rounded once.

    q      [rows, heads, 1, width] float32, bfloat16 or float16
    k, v   [rows, key heads, n, width] and [rows, key heads, n, value width], of q's dtype: heads / key heads neighbours
           share them; both widths multiples of 16
    mask   [rows or 1, 1, 1, n]: bool, True for what may be seen, or floats that are added to the scores
    scale  1 / sqrt(width) unless it is given
    Returns [rows, 1, heads, value width] in q's dtype; zeros where nothing may be seen. None for anything else than
    these, tensors on other devices, and without native code: then torch's own is to be taken.
    """
    if LIBRARY is None or not _serves(q, k, v):
        return None
    rows, heads, _, width = q.shape
    _, key_heads, n, value_width = v.shape
    added = None
    if mask is not None:
        if mask.dim() != 4 or mask.shape[0] not in (1, rows) or mask.shape[1:] != (1, 1, n) or not mask.is_cpu:
            return None
        if mask.dtype != torch.bool and not mask.is_floating_point():
            return None
        added = _added(mask, rows, n)
    q = q.contiguous()
    out = q.new_empty(rows, 1, heads, value_width)
    given = _Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), None if added is None else added.data_ptr(), out.data_ptr(),
        rows, heads, key_heads, n, width, value_width, *k.stride()[:3], *v.stride()[:3], FLOATS[q.dtype],
        width**-0.5 if scale is None else scale,
    )  # fmt: skip
    LIBRARY.whit_attend(given, torch.get_num_threads())
    return out


def _added(mask: Tensor, rows: int, n: int) -> Tensor:
    """What a mask adds to the scores, float32 [rows, n]."""
    if mask.dtype == torch.bool:
        added = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        mask = added.masked_fill_(mask.logical_not(), float("-inf"))
    return mask.float().expand(rows, 1, 1, n).reshape(rows, n).contiguous()
