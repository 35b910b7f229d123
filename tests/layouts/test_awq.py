"""AWQ words, against the format read nibble by nibble."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whit.grids.scaled import PerChannel, PerGroup, integer_grid
from whit.layouts.awq import AWQ
from whit.rounding.nearest import nearest

SLOTS = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # output within its eight -> nibble


def nibble(words: Tensor, row: int, out: int) -> int:
    return int(words[row, out // 8]) >> (4 * SLOTS[out % 8]) & 15


def by_the_format(parts: dict[str, Tensor]) -> Tensor:
    cols, rows = parts["qweight"].shape[0], parts["scales"].shape[1]
    size = cols // parts["scales"].shape[0]
    out = torch.empty(rows, cols)
    for o in range(rows):
        for i in range(cols):
            g = i // size
            level = nibble(parts["qweight"], i, o) - nibble(parts["qzeros"], g, o)
            out[o, i] = parts["scales"][g, o].float() * level
    return out


@settings(max_examples=20, deadline=None)
@given(size=st.sampled_from([16, 32, None]), symmetric=st.booleans(), seed=st.integers(0, 1000))
def test_every_nibble_is_in_its_place(size: int | None, symmetric: bool, seed: int) -> None:
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)) + (0 if symmetric else 1)
    grid = integer_grid(4, PerGroup(size) if size else PerChannel(), symmetric)
    q = nearest(W, grid)
    parts = AWQ().pack(q)
    for name, spec in AWQ().schema(grid, (24, 64)).items():
        assert (tuple(parts[name].shape), parts[name].dtype) == (spec.shape, spec.dtype)
    assert torch.equal(by_the_format(parts), q.dequantize())
    back = AWQ().unpack(parts)
    assert back.grid == grid
    assert torch.equal(back.codes, q.codes)


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    assert "4 bits" in str(AWQ().refuses(integer_grid(3, PerGroup(32), True), (8, 64)))
    assert "9 outputs" in str(AWQ().refuses(integer_grid(4, PerGroup(32), True), (9, 64)))
    assert "groups of 128" in str(AWQ().refuses(integer_grid(4, PerGroup(128), True), (8, 576)))
    with pytest.raises(ValueError, match="9 outputs"):
        AWQ().pack(nearest(torch.randn(9, 64), integer_grid(4, PerGroup(32), True)))
