import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.grids.levels import Table
from whit.grids.named import GRIDS
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import PerGroup, Scaled, integer_grid
from whit.rounding.nearest import nearest

SCALED = {name: grid for name, grid in GRIDS.items() if isinstance(grid, Scaled)}


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name", SCALED)
def test_every_code_is_the_nearest_level_by_brute_force(name: str) -> None:
    grid = SCALED[name]
    W = normal(3, 256)
    params = grid.store(grid.fit(W))
    codes = grid.round(W, params)
    chosen = (grid.decode(codes, params) - W).abs()
    if isinstance(grid.levels, Table):
        allowed = range(grid.levels.usable or len(grid.levels.numbers))
    else:
        allowed = range(1 if grid.levels.mirrored and grid.levels.bits == 8 else 0, 2**grid.levels.bits)
    every = torch.stack([(grid.decode(torch.full_like(codes, code), params) - W).abs() for code in allowed])
    # multiplying by the inverse of the scale may move a tie by one rounding error of float32
    assert (chosen <= every.amin(0) + 1e-6 * W.abs().max()).all()


@pytest.mark.parametrize("name", [n for n, g in SCALED.items() if g.offset.value != "minimum" and n != "iq4_nl"])
def test_zero_is_kept_exact(name: str) -> None:
    W = normal(2, 256)
    W[:, ::7] = 0
    assert (nearest(W, SCALED[name]).dequantize()[:, ::7] == 0).all()


@pytest.mark.parametrize("name", SCALED)
def test_zeros_stay_zeros_and_finite(name: str) -> None:
    assert (nearest(torch.zeros(2, 256), SCALED[name]).dequantize() == 0).all()


@pytest.mark.parametrize("name", SCALED)
@given(power=st.integers(-4, 4), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_a_power_of_two_on_the_weights_moves_the_scale_alone(name: str, power: int, seed: int) -> None:
    W = normal(2, 256, seed) + 0.5 * normal(2, 1, seed)
    plain, scaled = nearest(W, SCALED[name]), nearest(W * 2.0**power, SCALED[name])
    assert torch.equal(plain.codes, scaled.codes)


def test_grids_are_values() -> None:
    assert integer_grid(4, PerGroup(32), symmetric=True) == GRIDS["q4_0"]
    assert len(set(GRIDS.values())) == len(GRIDS)
    assert GRIDS["int4-g128"] != GRIDS["int4-g128-asym"]


@pytest.mark.parametrize(
    ("name", "bits"), [("q4_0", 4.5), ("q4_1", 5.0), ("q8_0", 8.5), ("int4-g128", 4.125), ("int4-g128-asym", 4.15625)]
)
def test_bits_per_weight_count_the_parameters(name: str, bits: float) -> None:
    assert GRIDS[name].bits_per_weight(1024) == bits


@pytest.mark.parametrize("name", ["int2", "int3-asym", "int4-tensor", "int8-tensor-asym", "int5-g128", "q5_1"])
def test_error_is_at_most_half_a_step_of_the_range(name: str) -> None:
    grid = SCALED[name]
    W = normal(4, 128)
    quantized = nearest(W, grid)
    step = quantized.params["scale"].float().abs().max()
    clipped_end = 1.0 if grid.levels.high + 1 == -grid.levels.low else 0.5  # the short end of -8..7 may clip one level
    assert (quantized.dequantize() - W).abs().max() <= (clipped_end + 0.02) * step


def test_rows_that_do_not_divide_name_the_group_sizes_that_do() -> None:
    with pytest.raises(ValueError, match="100 weights do not divide into groups of 32; no usual group size fits"):
        nearest(torch.zeros(1, 100), GRIDS["q4_0"])
    with pytest.raises(ValueError, match=r"groups of 16, 32, 64 fit"):
        nearest(torch.zeros(1, 1600), GRIDS["int4-g128"])


def test_a_scale_beyond_half_precision_is_refused() -> None:
    with pytest.raises(OverflowError, match="does not fit float16"):
        nearest(torch.full((1, 32), 1e9), GRIDS["q4_0"])


def test_codes_of_the_wrong_shape_are_refused() -> None:
    good = nearest(normal(2, 64), GRIDS["q4_0"])
    with pytest.raises(ValueError, match=r"codes .* must be torch.uint8 \[2, 64\], found torch.uint8 \[2, 32\]"):
        QuantizedTensor(good.grid, good.shape, good.codes[:, :32], good.params)
    with pytest.raises(ValueError, match="stores"):
        QuantizedTensor(good.grid, good.shape, good.codes, {})


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8 bits"):
        integer_grid(bits, PerGroup(32), symmetric=True)
