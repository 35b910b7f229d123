"""The fields of GGML's lattice blocks: indices, signs and sub-scales in their places.

Codes are those of `grids/lattice.py`: indices from the lowest bit on, then a sign per weight.
Source: the IQ2 and IQ3 block formats as listed in docs/formats.md; checked bit for bit against the `gguf` package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.layouts.ggml_fields import Block, Field


def _bytes(values: Tensor, n_bytes: int) -> Tensor:
    """Little-endian bytes of integers [n, k] -> [n, k * n_bytes] uint8."""
    raw = values.long().contiguous().view(torch.uint8).view(*values.shape, 8)
    return raw[..., :n_bytes].flatten(1)


def _integers(raw: Tensor, n_bytes: int) -> Tensor:
    """The reverse: [n, k * n_bytes] uint8 -> [n, k] int64."""
    places = 8 * torch.arange(n_bytes)
    return (raw.reshape(raw.shape[0], -1, n_bytes).long() << places).sum(-1)


def _spread(values: Tensor, count: int, bits: int) -> Tensor:
    """Cut integers [n, k] into `count` pieces of `bits`, lowest first -> [n, k * count]."""
    return ((values[..., None] >> (bits * torch.arange(count))) & ((1 << bits) - 1)).flatten(1)


def _joined(values: Tensor, count: int, bits: int) -> Tensor:
    """The reverse: [n, k * count] -> [n, k] int64."""
    return (values.long().reshape(values.shape[0], -1, count) << (bits * torch.arange(count))).sum(-1)


def _eighth(signs: Tensor) -> Tensor:
    """Seven sign bits -> eight with an even number of ones."""
    odd = _spread(signs, 7, 1).view(*signs.shape, 7).sum(-1) & 1
    return signs | (odd << 7)


def _indices(parts: int, bits: int) -> Field:
    """The low eight bits of every index, a byte each; `parts` indices of `bits` bits per code."""

    def pack(block: Block) -> Tensor:
        return _bytes(_spread(block["codes"].long(), parts, bits) & 255, 1)

    def unpack(raw: Tensor) -> dict[str, Tensor]:
        return {"codes": _joined(raw, parts, bits).int()}

    return Field(256 * parts // (8 if parts == 2 or bits == 10 else 4), pack, unpack)


def _high_bits(bits: int, count: int, size: int) -> Field:
    """The bits of an index above the eighth, `count` codes to a byte."""
    each = bits - 8

    def pack(block: Block) -> Tensor:
        return _bytes(_joined((block["codes"] >> 8) & ((1 << each) - 1), count, each), 1)

    def unpack(raw: Tensor) -> dict[str, Tensor]:
        return {"codes": (_spread(raw.long(), count, each) << 8).int()}

    return Field(size, pack, unpack)


def _signs(shift: int, step: int) -> Field:
    """A bit per weight, eight to a byte."""

    def pack(block: Block) -> Tensor:
        return _bytes(_joined(block["codes"] >> shift, 8 // step, step), 1)

    def unpack(raw: Tensor) -> dict[str, Tensor]:
        return {"codes": (_spread(raw.long(), 8 // step, step) << shift).int()}

    return Field(32, pack, unpack)


def _sub_scales(count: int) -> Field:
    """Four bits each, the first of two in the low half."""
    return Field(
        count // 2,
        lambda block: _bytes(_joined(block["sub_scale"], 2, 4), 1),
        lambda raw: {"sub_scale": _spread(raw.long(), 2, 4).to(torch.uint8)},
    )


def _sign_words(shift: int) -> Field:
    """Per 32 weights a 32-bit word: four times seven signs from the low end, the sub-scale on top."""

    def pack(block: Block) -> Tensor:
        signs = _joined((block["codes"] >> shift) & 127, 4, 7)  # [n, 8]
        return _bytes(signs | (block["sub_scale"].long() << 28), 4)

    def unpack(raw: Tensor) -> dict[str, Tensor]:
        words = _integers(raw, 4)
        signs = _eighth(_spread(words & ((1 << 28) - 1), 4, 7))
        return {"codes": (signs << shift).int(), "sub_scale": (words >> 28).to(torch.uint8)}

    return Field(32, pack, unpack)


def _pack_iq2_xxs(block: Block) -> Tensor:
    indices = _bytes(block["codes"] & 255, 1).view(-1, 8, 4)
    words = _WORDS.pack(block).view(-1, 8, 4)
    return torch.cat([indices, words], 2).flatten(1)


def _unpack_iq2_xxs(raw: Tensor) -> dict[str, Tensor]:
    halves = raw.reshape(-1, 8, 8)
    found = _WORDS.unpack(halves[:, :, 4:].flatten(1))
    return {**found, "codes": found["codes"] | halves[:, :, :4].flatten(1).int()}


def _pack_iq2_xs(block: Block) -> Tensor:
    return _bytes((block["codes"] & 511) | (((block["codes"] >> 9) & 127) << 9), 2)


def _unpack_iq2_xs(raw: Tensor) -> dict[str, Tensor]:
    words = _integers(raw, 2)
    return {"codes": ((words & 511) | (_eighth(words >> 9) << 9)).int()}


_WORDS = _sign_words(8)
# IQ2_XXS: per 32 weights four indices, then their word of signs and sub-scale.
IQ2_XXS_FIELDS = (Field(64, _pack_iq2_xxs, _unpack_iq2_xxs),)
# IQ2_XS: per 8 weights an index of nine bits and seven signs.
IQ2_XS_FIELDS = (Field(64, _pack_iq2_xs, _unpack_iq2_xs), _sub_scales(16))
IQ2_S_FIELDS = (_indices(1, 10), _signs(10, 8), _high_bits(10, 4, 8), _sub_scales(16))
IQ3_XXS_FIELDS = (_indices(2, 8), _sign_words(16))
IQ3_S_FIELDS = (_indices(1, 9), _high_bits(9, 8, 8), _signs(9, 4), _sub_scales(8))
