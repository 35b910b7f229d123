"""Levels learned per row, group or matrix: k-means in one dimension."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.grids.codebook import Codebook
from whit.grids.named import GRIDS, grid_name, grid_named
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import PerChannel, PerGroup, PerTensor, integer_grid
from whit.kernels.matmul import dequantize
from whit.kernels.packed import pack, unpack
from whit.layouts.native import Native
from whit.rounding.nearest import Rounding, nearest, search

BITS = (1, 2, 3, 4, 5, 8)


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", BITS)
def test_every_code_is_the_nearest_level_by_brute_force(bits: int) -> None:
    grid, W = Codebook(bits), normal(5, 300)
    params = grid.store(grid.fit(W))
    chosen = (grid.decode(grid.round(W, params), params) - W).abs()
    every = (params["levels"].float()[:, None, :] - W[..., None]).abs()  # [rows, cols, levels]
    assert torch.equal(chosen, every.amin(-1))


@pytest.mark.parametrize("bits", BITS)
def test_levels_ascend_and_are_stored_in_half_precision(bits: int) -> None:
    params = Codebook(bits).search(normal(4, 100), None)
    assert params["levels"].dtype == torch.float16
    assert (params["levels"].float().diff(dim=1) >= 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_two_levels_are_the_best_of_all_splits(seed: int) -> None:
    """In one dimension clusters are intervals: all splits of a sorted row can be tried."""
    W = normal(1, 40, seed)
    x = W[0].double().sort().values
    best = min(sum(((part - part.mean()) ** 2).sum().item() for part in (x[:cut], x[cut:])) for cut in range(1, len(x)))
    found = (nearest(W, Codebook(1)).dequantize() - W).square().sum().item()
    assert best * 0.999 <= found <= best * 1.001


def test_four_levels_are_the_best_of_all_splits() -> None:
    W = normal(1, 24, 3)
    x = W[0].double().sort().values
    best = min(
        sum(((part - part.mean()) ** 2).sum().item() for part in torch.tensor_split(x, list(cuts)) if len(part))
        for cuts in itertools.combinations(range(1, len(x)), 3)
    )
    assert (nearest(W, Codebook(2)).dequantize() - W).square().sum().item() <= best * 1.002


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rounding", [nearest, search])
def test_heavy_tails_cost_less_than_on_integers(rounding: Rounding, bits: int) -> None:
    W = normal(16, 512) / normal(4, 16 * 512, 1).square().mean(0).sqrt().view(16, 512)  # Student's t, 4 degrees
    uniform = integer_grid(bits, PerChannel(), symmetric=False)
    errors = [(rounding(W, grid).dequantize() - W).square().sum(1) for grid in (Codebook(bits), uniform)]
    assert (errors[0] < errors[1]).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_search_with_weights_serves_the_weights(bits: int) -> None:
    W, weights = normal(8, 256), torch.logspace(-3, 3, 256)
    plain, weighted = nearest(W, Codebook(bits)), search(W, Codebook(bits), weights)
    errors = [((each.dequantize() - W).square() * weights).sum() for each in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]


def test_rows_of_few_values_are_exact() -> None:
    values = torch.tensor([-2.0, -0.5, 0.0, 4.0])
    W = values[torch.randint(0, 4, (6, 64), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(nearest(W, Codebook(2)).dequantize(), W)
    assert torch.equal(nearest(torch.zeros(2, 8), Codebook(3)).dequantize(), torch.zeros(2, 8))
    assert torch.equal(nearest(torch.full((2, 8), 0.375), Codebook(3)).dequantize(), torch.full((2, 8), 0.375))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_weights_cost_what_is_known_to_be_least(bits: int) -> None:
    """Source: Max 1960, table I: the error of the best quantizer of a normal variable with 4, 8 and 16 levels."""
    W = normal(4, 20_000)
    error = (nearest(W, Codebook(bits)).dequantize() - W).square().mean().item()
    assert error == pytest.approx({2: 0.1175, 3: 0.03454, 4: 0.009497}[bits], rel=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_what_is_rounded_changes_nothing(bits: int) -> None:
    Q = nearest(normal(8, 200), Codebook(bits)).dequantize()
    assert torch.equal(nearest(Q, Codebook(bits)).dequantize(), Q)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-12])
def test_tiny_weights_stay_finite(scale: float) -> None:
    params = Codebook(3).fit(normal(3, 100) * scale)
    assert torch.isfinite(params["levels"]).all()
    assert (params["levels"].diff(dim=1) >= 0).all()


def test_rows_shorter_than_the_table_are_nearly_exact() -> None:
    W = normal(3, 7)
    assert (nearest(W, Codebook(4)).dequantize() - W).abs().max() < 2e-3


def test_rows_do_not_see_each_other() -> None:
    W = normal(6, 100)
    together, apart = nearest(W, Codebook(3)), [nearest(row, Codebook(3)) for row in W.split(1)]
    assert torch.equal(together.dequantize(), torch.cat([each.dequantize() for each in apart]))


@given(power=st.integers(-6, 6), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_a_power_of_two_on_the_weights_moves_the_levels_alone(power: int, seed: int) -> None:
    W = normal(2, 50, seed)
    a, b = nearest(W, Codebook(2)), nearest(W * 2.0**power, Codebook(2))
    assert torch.equal(a.codes, b.codes)
    assert torch.allclose(a.params["levels"].float() * 2.0**power, b.params["levels"].float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cols", [1, 31, 64, 100])
@pytest.mark.parametrize("bits", BITS)
def test_packed_and_back(bits: int, cols: int) -> None:
    quantized = nearest(normal(19, cols), Codebook(bits))
    again = unpack(pack(quantized))
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.params["levels"], quantized.params["levels"])


@pytest.mark.parametrize("cols", [32, 96, 256])
@pytest.mark.parametrize("bits", BITS)
def test_folders_hold_it(bits: int, cols: int) -> None:
    grid, shape = Codebook(bits), (5, cols)
    quantized = nearest(normal(*shape), grid)
    refused = Native().refuses(grid, shape)
    if refused is None:
        again = Native().unpack(Native().pack(quantized), grid)
        assert torch.equal(again.codes, quantized.codes)
        assert torch.equal(again.params["levels"], quantized.params["levels"])
    else:
        assert str(cols) in refused


@pytest.mark.parametrize("bits", BITS)
def test_bits_per_weight_are_those_of_the_tensors(bits: int) -> None:
    grid, shape = Codebook(bits), (8, 128)
    n_bits = 8 * 128 * bits + 16 * sum(each.shape[0] * each.shape[1] for each in grid.schema(shape).values())
    assert grid.bits_per_weight(128) == n_bits / (8 * 128)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_name_is_found_again(bits: int) -> None:
    assert grid_named(grid_name(Codebook(bits))) == Codebook(bits)
    assert grid_named(f"codebook{bits}") == grid_named(f"kmeans{bits}") == Codebook(bits)


SHARES = ("", "-g32", "-tensor")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_tables_of_any_share_are_found_stored_and_packed(bits: int, share: str) -> None:
    grid, W = grid_named(f"kmeans{bits}{share}"), normal(19, 96)
    assert grid_named(grid_name(grid)) == grid
    quantized = nearest(W, grid)
    for again in (unpack(pack(quantized)), Native().unpack(Native().pack(quantized), grid)):
        assert torch.equal(again.codes, quantized.codes)
        assert torch.equal(again.params["levels"], quantized.params["levels"])
    assert torch.equal(dequantize(pack(quantized)), quantized.dequantize())
    n_tables = {"": 19, "-g32": 19 * 3, "-tensor": 1}[share]
    assert quantized.params["levels"].numel() == n_tables * 2**bits


def test_a_group_has_the_levels_of_a_row_like_it() -> None:
    W = normal(4, 96)
    together, apart = nearest(W, Codebook(2, PerGroup(32))), nearest(W.view(12, 32), Codebook(2))
    assert torch.equal(together.dequantize(), apart.dequantize().view(4, 96))
    whole = nearest(W, Codebook(3, PerTensor()))
    assert torch.equal(whole.dequantize(), nearest(W.view(1, -1), Codebook(3)).dequantize().view(4, 96))


def test_finer_shares_lose_less() -> None:
    W = normal(16, 256) * torch.logspace(-1, 1, 16)[:, None] * torch.linspace(0.2, 2, 256)
    errors = [(nearest(W, grid_named(f"kmeans3{s}")).dequantize() - W).square().sum() for s in ("-g32", "", "-tensor")]
    assert errors[0] < errors[1] < errors[2]


def test_groups_that_divide_no_row_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide into groups of 64"):
        nearest(normal(2, 96), Codebook(2, PerGroup(64)))


def test_other_widths_and_huge_levels_are_refused() -> None:
    for bits in (0, 9):
        with pytest.raises(ValueError, match="1 to 8"):
            Codebook(bits)
    with pytest.raises(OverflowError, match="float16"):
        nearest(normal(2, 16) * 1e6, Codebook(2))


def test_values_are_checked_against_the_grid() -> None:
    with pytest.raises(ValueError, match="levels"):
        QuantizedTensor(Codebook(2), (2, 8), torch.zeros(2, 8, dtype=torch.uint8), {"levels": torch.zeros(2, 5).half()})
    assert "kmeans4" in GRIDS
