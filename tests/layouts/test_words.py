"""Streams of bits, against one big integer per row and against compressed-tensors' own packing."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from whit.layouts.words import n_words, pack_words, unpack_words


def as_integer(codes: list[int], bits: int) -> int:
    return sum(code << (j * bits) for j, code in enumerate(codes))


@given(bits=st.integers(1, 16), cols=st.integers(1, 100), seed=st.integers(0, 10**6))
def test_a_row_is_one_integer(bits: int, cols: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    words = pack_words(codes, bits)
    assert words.shape == (3, n_words(cols, bits))
    for row, packed in zip(codes.tolist(), words, strict=True):
        assert int.from_bytes(packed.numpy().tobytes(), "little") == as_integer(row, bits)
    assert torch.equal(unpack_words(words, bits, cols).int(), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("cols", [32, 40, 33])
def test_compressed_tensors_packs_the_same(bits: int, cols: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, cols), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    words = pack_words(codes, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, torch.Size((5, cols))), signed)


def test_another_number_of_words_is_refused() -> None:
    with pytest.raises(ValueError, match="take 2 words"):
        unpack_words(torch.zeros(1, 3, dtype=torch.int32), 4, 16)
