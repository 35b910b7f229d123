"""The fields that GGML's blocks are made of: bits to their places and back.

A block is worked on as a dictionary of tensors over n blocks: `codes` [n, weights], floats [n], integer sub-scales and
minima [n, sub-blocks]. A field turns some of them into its bytes [n, n_bytes] and back; of codes that are spread over
several fields each gives its bits.
Source: the GGML block formats as listed in docs/formats.md; checked bit for bit against the `gguf` package.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.native import LIBRARY

Block = Mapping[str, Tensor]


@dataclass(frozen=True)
class Field:
    """One field of a block, on n blocks at once.

    n_bytes  bytes per block
    pack     the block's tensors -> [n, n_bytes] uint8
    unpack   [n, n_bytes] uint8 -> the tensors, or bits of the codes, that the field holds
    """

    n_bytes: int
    pack: Callable[[Block], Tensor]
    unpack: Callable[[Tensor], dict[str, Tensor]]


def half(name: str) -> Field:
    """A half-precision float."""
    return Field(
        2,
        lambda block: block[name].contiguous().view(torch.uint8).view(-1, 2),
        lambda raw: {name: raw.clone(memory_format=torch.contiguous_format).view(torch.float16).view(-1)},
    )


def _codes(n_bytes: int, pack: Callable[[Tensor], Tensor], unpack: Callable[[Tensor], Tensor]) -> Field:
    return Field(n_bytes, lambda block: pack(block["codes"]), lambda raw: {"codes": unpack(raw)})


def side_by_side(fields: Sequence[Tensor]) -> Tensor:
    """Fields [n, n_bytes] uint8 of n blocks as blocks [n, sum of n_bytes]."""
    function = getattr(LIBRARY, "whit_interleave", None)
    if function is None or any(each.device.type != "cpu" for each in fields):
        return torch.cat(list(fields), dim=1)
    fields, n = [each.contiguous() for each in fields], len(fields[0])
    widths = [each.shape[1] for each in fields]
    out = torch.empty(n, sum(widths), dtype=torch.uint8)
    pointers = (ctypes.c_void_p * len(fields))(*(each.data_ptr() for each in fields))
    sizes = (ctypes.c_int64 * len(fields))(*widths)
    function(pointers, sizes, len(fields), ctypes.c_int64(n), ctypes.c_void_p(out.data_ptr()), torch.get_num_threads())
    return out


def _joined(codes: Tensor, shift: int) -> Tensor:
    """Bits `shift` and up of k codes in one byte: [n, k, m] to [n, m], 8 / k bits each, those of the first lowest."""
    n, k, m = codes.shape
    function = getattr(LIBRARY, "whit_join_codes", None)
    if function is not None and codes.is_contiguous() and codes.device.type == "cpu":
        out = torch.empty(n, m, dtype=torch.uint8)
        sizes = [ctypes.c_int64(size) for size in (n, k, m)]
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in (codes, out)]
        function(pointers[0], *sizes, shift, pointers[1], torch.get_num_threads())
        return out
    width = 8 // k
    mask = (1 << width) - 1
    found = (codes[:, 0] >> shift) & mask
    for i in range(1, k):  # by `or`: a sum of bytes takes five times as long
        found |= ((codes[:, i] >> shift) & mask) << (i * width)
    return found


def nibbles(size: int, chunk: int) -> Field:
    """Four bits per weight: in every chunk of weights, byte j holds element j (low) and j + chunk / 2 (high)."""

    def pack(codes: Tensor) -> Tensor:
        return _joined(codes.view(-1, 2, chunk // 2), 0).view(-1, size // 2)

    def unpack(raw: Tensor) -> Tensor:
        halves = raw.reshape(-1, size // chunk, 1, chunk // 2)
        return torch.cat((halves & 15, halves >> 4), dim=2).view(-1, size)

    return _codes(size // 2, pack, unpack)


def pairs(size: int, chunk: int, shift: int) -> Field:
    """Two bits per weight, bits `shift` and up of the codes: byte j of a chunk holds elements j, j + chunk / 4, ..."""
    places = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]  # [4, 1]

    def pack(codes: Tensor) -> Tensor:
        return _joined(codes.view(-1, 4, chunk // 4), shift).view(-1, size // 4)

    def unpack(raw: Tensor) -> Tensor:
        bytes_ = raw.reshape(-1, size // chunk, 1, chunk // 4)
        return (((bytes_ >> places) & 3) << shift).view(-1, size)

    return _codes(size // 4, pack, unpack)


def single_bits(size: int, shift: int) -> Field:
    """Bit `shift` of the codes; byte j holds elements j, j + size / 8, ... from its lowest bit on."""
    places = torch.arange(8, dtype=torch.uint8)[:, None]

    def pack(codes: Tensor) -> Tensor:
        return _joined(codes.view(-1, 8, size // 8), shift)

    def unpack(raw: Tensor) -> Tensor:
        return (((raw[:, None] >> places) & 1) << shift).view(-1, size)

    return _codes(size // 8, pack, unpack)


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    return _joined(codes.view(-1, 8, 1), 4).view(-1, 4)  # bit j of byte k belongs to element 8 k + j


def _unpack_fifth_bits(raw: Tensor) -> Tensor:
    bits = (raw[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [n, 4, 8]
    return (bits << 4).view(-1, 32)


SCALE, MINIMUM = half("scale"), half("minimum")
FIFTH_BITS = _codes(4, _pack_fifth_bits, _unpack_fifth_bits)  # of blocks of 32: in order, eight to a byte
# int8 in the file, level + 128 as a code: the top bit differs, nothing else.
SIGNED_BYTES = _codes(32, lambda codes: codes ^ 128, lambda raw: raw ^ 128)

# Q2_K: a scale in the low and a minimum in the high nibble of a byte per sub-block.
Q2_SUBS = Field(
    16,
    lambda block: block["sub_scale"].view(torch.uint8) | (block["sub_minimum"] << 4),
    lambda raw: {"sub_scale": (raw & 15).view(torch.int8), "sub_minimum": raw >> 4},
)
Q6_SUBS = Field(
    16,
    lambda block: block["sub_scale"].contiguous().view(torch.uint8),
    lambda raw: {"sub_scale": raw.clone(memory_format=torch.contiguous_format).view(torch.int8)},
)


def _pack_q3(block: Block) -> Tensor:
    s = (block["sub_scale"] + 32).view(torch.uint8)  # [n, 16], 0..63
    low = (s[:, :8] & 15) | ((s[:, 8:] & 15) << 4)
    top = (s >> 4).view(-1, 4, 4) << torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    return torch.cat((low, top.sum(1, dtype=torch.uint8)), dim=1)


def _unpack_q3(raw: Tensor) -> dict[str, Tensor]:
    low = torch.cat((raw[:, :8] & 15, raw[:, :8] >> 4), dim=1)
    top = (raw[:, None, 8:] >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]) & 3  # [n, 4, 4]
    return {"sub_scale": (low | (top.reshape(-1, 16) << 4)).view(torch.int8) - 32}


# Q3_K: sixteen 6-bit scales, the low four bits of scales j and j + 8 in byte j, then the top two, four to a byte.
Q3_SUBS = Field(12, _pack_q3, _unpack_q3)


def _pack_q4(block: Block) -> Tensor:
    s, m = block["sub_scale"].view(torch.uint8), block["sub_minimum"]  # [n, 8], 0..63
    first, second = s[:, :4] | ((s[:, 4:] >> 4) << 6), m[:, :4] | ((m[:, 4:] >> 4) << 6)
    return torch.cat((first, second, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)), dim=1)


def _unpack_q4(raw: Tensor) -> dict[str, Tensor]:
    first, second, third = raw.split(4, dim=1)
    s = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    m = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return {"sub_scale": s.view(torch.int8), "sub_minimum": m}


# Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima in twelve bytes.
Q4_SUBS = Field(12, _pack_q4, _unpack_q4)


def _pack_iq4(block: Block) -> Tensor:
    s = (block["sub_scale"] + 32).view(torch.uint8)  # [n, 8], 0..63
    top = ((s >> 4).view(-1, 2, 4) << torch.arange(0, 8, 2, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    low = (s & 15).view(-1, 4, 2)
    return torch.cat((top, low[:, :, 0] | (low[:, :, 1] << 4)), dim=1)


def _unpack_iq4(raw: Tensor) -> dict[str, Tensor]:
    top = ((raw[:, :2, None] >> torch.arange(0, 8, 2, dtype=torch.uint8)) & 3).reshape(-1, 8)
    low = torch.stack((raw[:, 2:] & 15, raw[:, 2:] >> 4), dim=-1).view(-1, 8)
    return {"sub_scale": (low | (top << 4)).view(torch.int8) - 32}


# IQ4_XS: the top two bits of eight scales in two bytes, then the low four in four.
IQ4_SUBS = Field(6, _pack_iq4, _unpack_iq4)


def _pack_q5_bits(codes: Tensor) -> Tensor:
    return _joined(codes.view(-1, 8, 32), 4)  # bit j of byte l belongs to element 32 j + l


def _unpack_q5_bits(raw: Tensor) -> Tensor:
    return (((raw[:, None] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1) << 4).view(-1, 256)


Q5_BITS = _codes(32, _pack_q5_bits, _unpack_q5_bits)


def _pack_q6_low(codes: Tensor) -> Tensor:
    return _joined(codes.view(-1, 2, 64), 0).view(-1, 128)  # per half of 128: elements l and l + 64, l below 64


def _unpack_q6_low(raw: Tensor) -> Tensor:
    first, second = raw.reshape(-1, 2, 64).split(32, dim=2)
    return torch.stack((first & 15, second & 15, first >> 4, second >> 4), dim=2).view(-1, 256)


Q6_LOW = _codes(128, _pack_q6_low, _unpack_q6_low)


# MXFP4: the scale is a power of two, stored as the exponent of float32.
EXPONENT = Field(
    1,
    lambda block: block["scale"].contiguous().view(torch.uint8).view(-1, 1),
    lambda raw: {"scale": raw.contiguous().view(torch.float8_e8m0fnu).view(-1)},
)
# FP4 codes have a sign bit over the magnitude's three; in a level table they are in ascending order.
_FP4 = torch.tensor([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
_FP4_ORDER = torch.tensor([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8)
_NIBBLES = nibbles(32, 32)
FP4_NIBBLES = Field(
    16,
    lambda block: _NIBBLES.pack({"codes": _FP4[block["codes"].int()]}),
    lambda raw: {"codes": _FP4_ORDER[_NIBBLES.unpack(raw)["codes"].int()]},
)

# TQ1_0: five trits to a byte, as the fraction t/243 rounded up to t/256: multiplying by three shifts the next one out.
# Weights 0..159 in 32 bytes, 160..239 in 16, the last 16 in four bytes of four.
_TRIT_RUNS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))
_POWERS = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32)


def _pack_trits(codes: Tensor) -> Tensor:
    parts = []
    for start, n, width in _TRIT_RUNS:
        run = codes[:, start : start + n * width].view(-1, n, width).int()
        parts.append(((run * _POWERS[:n, None]).sum(1) * 256 + 242) // 243)
    return torch.cat(parts, dim=1).to(torch.uint8)


def _unpack_trits(raw: Tensor) -> Tensor:
    parts = []
    for (_, n, _), piece in zip(_TRIT_RUNS, raw.split((32, 16, 4), dim=1), strict=True):
        shifted = (piece[:, None].int() * _POWERS.flip(0)[:n, None]) & 255
        parts.append(((shifted * 3) >> 8).flatten(1))
    return torch.cat(parts, dim=1).to(torch.uint8)


TRITS = _codes(52, _pack_trits, _unpack_trits)
