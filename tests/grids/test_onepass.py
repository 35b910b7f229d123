"""The compiled one-pass rounding gives the bits of the same rules in torch, whatever the numbers and their type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.grids.named import grid_named
from whit.grids.onepass import nearest_codes
from whit.native import LIBRARY
from whit.rounding.nearest import _plain as in_torch
from whit.rounding.nearest import by_rows, nearest

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the compiled library is not there")
TYPES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
OTHERS = [
    "int4-g64",
    "int4-g64-asym",
    "int3-g128-asym",
    "int8",
    "int2-g16-min",
    "int4-g48",
    "int8-asym:f32",
    "int5:bf16",
]
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 3e-8, -3e-8, 1e-30, 2.5, -7.0, 60000.0])


def _same(W: torch.Tensor, name: str) -> None:
    grid = grid_named(name)
    found, wanted = nearest_codes(W, grid), by_rows(W, grid, lambda part: in_torch(part, grid))
    assert found is not None
    codes, params = found
    assert torch.equal(codes, wanted.codes)
    for key, value in wanted.params.items():
        assert torch.equal(params[key].view(torch.uint8), value.view(torch.uint8)), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TYPES + OTHERS)
def test_codes_and_parameters_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W = torch.randn(37, 768)
    for each in (W, W.mul(4).round().div(4), W.abs(), -W.abs() * 1e-6, torch.zeros_like(W), W * 100):
        _same(each.to(dtype), name)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=256, max_size=256), st.sampled_from(TYPES + OTHERS[:4]))
def test_edges(numbers: list[float], name: str) -> None:
    _same(torch.tensor([numbers]), name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0", "q6_k"])
def test_what_is_not_finite_is_left_to_others(name: str, dtype: torch.dtype, bad: float) -> None:
    W = torch.zeros(3, 512)
    W[1, 300] = bad
    assert nearest_codes(W.to(dtype), grid_named(name)) is None


def test_scales_that_do_not_fit_raise() -> None:
    W = torch.full((1, 256), 1e9)
    for name in ("q8_0", "q4_1", "q6_k"):
        with pytest.raises(OverflowError, match="not fit"):
            nearest(W, grid_named(name))


def test_other_grids_and_devices_are_left_to_torch() -> None:
    W = torch.randn(2, 256)
    for name in ("iq4_nl", "mxfp4", "nf4-g64", "f16", "iq2_xs", "fp8-tensor"):
        assert nearest_codes(W, grid_named(name)) is None
    assert nearest_codes(W.double(), grid_named("q4_0")) is None
    assert nearest_codes(W.to("meta"), grid_named("q4_0")) is None


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.sampled_from([1, 2, 3]))
def test_threads_change_nothing(rows: int, threads: int) -> None:
    before = torch.get_num_threads()
    W = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rows))
    try:
        torch.set_num_threads(threads)
        some, grid = nearest_codes(W, grid_named("q4_k")), grid_named("q4_k")
        torch.set_num_threads(1)
        one = nearest_codes(W, grid)
    finally:
        torch.set_num_threads(before)
    assert some is not None
    assert one is not None
    assert torch.equal(some[0], one[0])


def test_columns_that_are_not_next_to_each_other() -> None:
    W = torch.randn(256, 64).T
    _same(W, "q4_0")
