"""Codes of 1 to 16 bits as one little-endian stream of bits in 32-bit words, row by row.

Value j of a row begins at bit j * bits, low bits first; a value may straddle two words. This is how GPTQ packs along
the inputs (2, 3, 4 and 8 bits) and compressed-tensors along either axis; where bits divide 32 no value straddles.
Source: docs/formats.md; checked against compressed-tensors' own functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def n_words(n: int, bits: int) -> int:
    """Words that n values take."""
    return -(-n * bits // WORD)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int32 [rows, ceil(cols * bits / 32)] of unsigned codes [rows, cols] of any integer dtype.

    Bits beyond the last value are zero.
    """
    rows, cols = codes.shape
    groups = -(-cols // WORD)
    padded = torch.zeros(rows, groups * WORD, dtype=torch.int32)
    padded[:, :cols] = codes
    values = padded.view(rows, groups, WORD)
    words = torch.zeros(rows, groups, bits + 1, dtype=torch.int32)  # the last takes what the last value shifts out
    for j in range(WORD):
        word, offset = divmod(j * bits, WORD)
        words[..., word] |= values[..., j] << offset
        if offset + bits > WORD:
            words[..., word + 1] |= values[..., j] >> (WORD - offset)
    return words[..., :bits].reshape(rows, -1)[:, : n_words(cols, bits)].contiguous()


def unpack_words(words: Tensor, bits: int, cols: int) -> Tensor:
    """The codes [rows, cols], uint8 up to 8 bits and int32 above, in int32 words [rows, ceil(cols * bits / 32)].

    Raises ValueError for another number of words.
    """
    rows, found = words.shape
    if found != n_words(cols, bits):
        raise ValueError(f"{cols} values of {bits} bits take {n_words(cols, bits)} words a row, found {found}")
    groups = -(-cols // WORD)
    padded = torch.zeros(rows, groups * bits, dtype=torch.int32)
    padded[:, :found] = words
    of_group = padded.view(rows, groups, bits)
    codes = torch.empty(rows, groups, WORD, dtype=torch.uint8 if bits <= 8 else torch.int32)
    mask = (1 << bits) - 1
    for j in range(WORD):
        word, offset = divmod(j * bits, WORD)
        value = (of_group[..., word] >> offset) & ((1 << min(bits, WORD - offset)) - 1)
        if offset + bits > WORD:
            value |= (of_group[..., word + 1] << (WORD - offset)) & mask
        codes[..., j] = value
    return codes.view(rows, -1)[:, :cols].contiguous()
