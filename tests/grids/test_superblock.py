import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whit.grids.named import GRIDS
from whit.grids.quantized import QuantizedTensor
from whit.grids.superblock import Superblock
from whit.rounding.nearest import nearest, search

NAMES = [name for name, grid in GRIDS.items() if isinstance(grid, Superblock)]


def weights(seed: int, rows: int = 8, cols: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, cols, generator=generator) * torch.exp(0.7 * torch.randn(rows, cols, generator=generator))
    return W * 0.02


def importance(seed: int, cols: int = 512) -> Tensor:
    return torch.exp(torch.randn(cols, generator=torch.Generator().manual_seed(seed + 1)))


def errors(W: Tensor, quantized: QuantizedTensor, weight: Tensor) -> Tensor:
    """Weighted squared error of every superblock."""
    return ((quantized.dequantize() - W).square() * weight).view(W.shape[0], -1, 256).sum(-1)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_search_is_never_worse_than_the_range_rule_in_any_superblock(name: str, seed: int) -> None:
    W, weight = weights(seed), importance(seed)
    plain, found = nearest(W, GRIDS[name]), search(W, GRIDS[name], weight)
    assert (errors(W, found, weight) <= errors(W, plain, weight) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_late_choice_never_makes_its_sub_block_worse_and_leaves_the_others(name: str) -> None:
    grid = GRIDS[name]
    assert isinstance(grid, Superblock)
    W, moved = weights(3, cols=256), weights(4, cols=256)
    params = grid.search(W, None)
    for inner in range(256 // grid.sub):
        span = slice(inner * grid.sub, (inner + 1) * grid.sub)
        new = grid.late(moved[:, span], torch.ones(grid.sub), params, inner)
        before, after = (
            (grid.decode(grid.round(moved, each), each) - moved)[:, span].square().sum(1) for each in (params, new)
        )
        assert (after <= before * (1 + 1e-6)).all()
        for key in params:
            if key.startswith("sub"):
                kept = [j for j in range(params[key].shape[1]) if j != inner]
                assert torch.equal(params[key][:, kept], new[key][:, kept])
            else:
                assert torch.equal(params[key], new[key])


@pytest.mark.parametrize("name", NAMES)
def test_effective_scales_and_bases_say_what_decode_does(name: str) -> None:
    grid = GRIDS[name]
    assert isinstance(grid, Superblock)
    quantized = search(weights(5), grid)
    decoded = quantized.dequantize()
    scale, offset = grid.effective(quantized.params)
    levels = grid.levels.values(quantized.codes)
    values = levels * scale.repeat_interleave(grid.sub, 1)
    if offset is not None:
        values += offset.repeat_interleave(grid.sub, 1)
    torch.testing.assert_close(values, decoded, rtol=1e-6, atol=1e-9)
    bases = grid.bases(quantized.codes, quantized.params)
    total = sum(quantized.params[key].float().repeat_interleave(256, 1) * basis for key, basis in bases.items())
    torch.testing.assert_close(total, decoded, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", [nearest, search])
def test_zeros_stay_zeros(name: str, rounding: object) -> None:
    quantized = rounding(torch.zeros(2, 512), GRIDS[name])  # type: ignore[operator]
    assert torch.equal(quantized.dequantize(), torch.zeros(2, 512))


@pytest.mark.parametrize("name", NAMES)
def test_constant_tiny_and_outlying_weights_stay_finite_and_near(name: str) -> None:
    W = weights(6, rows=4)
    W[0], W[1], W[2, 7] = 0.25, W[1] * 1e-5, 100.0
    decoded = search(W, GRIDS[name]).dequantize()
    assert torch.isfinite(decoded).all()
    assert ((decoded - W).square().sum(1) <= W.square().sum(1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_beyond_half_precision_are_refused(name: str) -> None:
    with pytest.raises(OverflowError, match="does not fit float16"):
        nearest(torch.full((1, 256), 1e9), GRIDS[name])


def test_rows_that_are_no_whole_superblocks_are_refused() -> None:
    with pytest.raises(ValueError, match="576 weights do not divide into superblocks of 256"):
        nearest(torch.zeros(1, 576), GRIDS["q4_k"])
