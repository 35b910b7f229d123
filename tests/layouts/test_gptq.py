"""GPTQ words, against the formula of the format read bit by bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from whit.grids.indexed import INDEX, Indexed
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import PerChannel, PerGroup, integer_grid
from whit.layouts.gptq import GPTQ
from whit.rounding.nearest import nearest


def value(words: list[int], j: int, bits: int) -> int:
    stream = sum((word & 0xFFFFFFFF) << (32 * n) for n, word in enumerate(words))
    return stream >> (j * bits) & ((1 << bits) - 1)


def by_the_format(parts: dict[str, Tensor], bits: int, version: int) -> Tensor:
    """[out, in]: scale * (q - z), every field picked out of its words."""
    cols, rows = parts["g_idx"].numel(), parts["qweight"].shape[1]
    out = torch.empty(rows, cols)
    for o in range(rows):
        column = parts["qweight"][:, o].tolist()
        for i in range(cols):
            g = int(parts["g_idx"][i])
            z = value(parts["qzeros"][g].tolist(), o, bits)
            z = (z + 1) % 2**bits if version == 1 else z
            out[o, i] = parts["scales"][g, o].float() * (value(column, i, bits) - z)
    return out


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([16, 32, 64, None]),
    symmetric=st.booleans(),
    version=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@example(bits=2, size=64, symmetric=False, version=2, seed=30)  # every zero point is 1: what version 1 stores for 2
def test_every_field_is_in_its_place(bits: int, size: int | None, symmetric: bool, version: int, seed: int) -> None:
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) + (0 if symmetric else 1)
    grid = integer_grid(bits, PerGroup(size) if size and size < 64 else PerChannel(), symmetric)
    q = nearest(W, grid)
    parts = GPTQ(version).pack(q)
    for name, spec in GPTQ(version).schema(grid, (32, 64)).items():
        assert (tuple(parts[name].shape), parts[name].dtype) == (spec.shape, spec.dtype)
    # on a version 1 file a zero point of 0 wraps around; readers that add before they mask see 2^b instead
    assert torch.equal(by_the_format(parts, bits, version), q.dequantize())
    back = GPTQ(version, symmetric).unpack(parts, bits)
    assert torch.equal(back.dequantize(), q.dequantize())
    if not (back.params["scale"] == 0).any() and (symmetric or (q.params["zero"] != 1 << (bits - 1)).any()):
        assert back.grid == grid


def test_symmetric_words_are_those_of_the_format() -> None:
    q = nearest(torch.randn(8, 64), integer_grid(4, PerGroup(32), symmetric=True))
    assert set(GPTQ(1).pack(q)["qzeros"].flatten().tolist()) == {0x77777777}
    assert {word & 0xFFFFFFFF for word in GPTQ(2).pack(q)["qzeros"].flatten().tolist()} == {0x88888888}


@pytest.mark.parametrize("version", [1, 2])
def test_a_wrong_label_does_no_harm_to_symmetric_files(version: int) -> None:
    q = nearest(torch.randn(8, 64), integer_grid(4, PerGroup(32), symmetric=True))
    parts = GPTQ(3 - version).pack(q)
    assert GPTQ(version).mislabelled(parts["qzeros"], 4, 8)
    assert not GPTQ(3 - version).mislabelled(parts["qzeros"], 4, 8)
    assert torch.equal(GPTQ(version).unpack(parts, 4).dequantize(), q.dequantize())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("zero", [6, 7, 8, 9])
def test_files_with_zero_points_are_read_by_their_label_whatever_the_constant(version: int, zero: int) -> None:
    q = nearest(torch.randn(8, 64), integer_grid(4, PerGroup(32), symmetric=False))
    q = replace(q, params={**q.params, "zero": torch.full_like(q.params["zero"], zero)})
    parts = GPTQ(version).pack(q)
    assert not GPTQ(version, symmetric=False).mislabelled(parts["qzeros"], 4, 8)
    assert torch.equal(GPTQ(version, symmetric=False).unpack(parts, 4).dequantize(), q.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("cols", [64, 80])  # 80 leaves the last group of 32 with half its columns
def test_act_order_comes_back_with_its_index(symmetric: bool, cols: int) -> None:
    grid = Indexed(integer_grid(4, PerGroup(32), symmetric))
    W = torch.randn(16, cols, generator=torch.Generator().manual_seed(1)) + 0.7
    order = torch.randperm(cols, generator=torch.Generator().manual_seed(2))
    plain = nearest(W, grid)
    params = {**plain.params, INDEX: (torch.arange(cols) // 32)[order].int()}
    q = QuantizedTensor(grid, (16, cols), grid.round(W, params), params)
    parts = GPTQ(2).pack(q)
    assert torch.equal(by_the_format(parts, 4, 2), q.dequantize())
    back = GPTQ(2).unpack(parts, 4)
    assert back.grid == replace(grid, base=replace(grid.base, scheme=back.grid.base.scheme))
    assert torch.equal(back.dequantize(), q.dequantize())


def test_a_file_without_an_index_has_groups_of_neighbours() -> None:
    q = nearest(torch.randn(8, 64), integer_grid(4, PerGroup(32), symmetric=True))
    parts = GPTQ(2).pack(q)
    del parts["g_idx"]
    assert torch.equal(GPTQ(2).unpack(parts, 4).dequantize(), q.dequantize())


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    layout = GPTQ(2)
    assert "fill 32-bit words" in str(layout.refuses(integer_grid(4, PerGroup(32), True), (9, 64)))
    assert "groups of 128" in str(layout.refuses(integer_grid(4, PerGroup(128), True), (8, 576)))
    assert "2, 3, 4, 8 bits" in str(layout.refuses(integer_grid(5, PerGroup(32), True), (32, 64)))
    assert "half precision" in str(layout.refuses(integer_grid(4, PerGroup(32), True, torch.bfloat16), (8, 64)))
    with pytest.raises(ValueError, match="fill 32-bit words"):
        layout.pack(nearest(torch.randn(9, 64), integer_grid(4, PerGroup(32), True)))


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    parts = GPTQ(2).pack(nearest(torch.randn(8, 64), integer_grid(4, PerGroup(32), symmetric=True)))
    with pytest.raises(ValueError, match="qzeros"):
        GPTQ(2).unpack({**parts, "qzeros": parts["qzeros"][:1]}, 4)
    with pytest.raises(ValueError, match="names group 7"):
        GPTQ(2).unpack({**parts, "g_idx": parts["g_idx"] + 6}, 4)
