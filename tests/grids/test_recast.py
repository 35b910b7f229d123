import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.grids.indexed import INDEX, Indexed
from whit.grids.named import grid_named
from whit.grids.quantized import QuantizedTensor
from whit.grids.recast import first_exact, recast
from whit.grids.scaled import Scaled
from whit.rounding.nearest import nearest

W = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) + 0.2

HELD = [  # grids, and others that hold all of their values
    ("int4-g128", "int4-g32"),
    ("int4-g128", "int4-g128-asym"),
    ("int4-g128", "int4-g32-asym"),
    ("int4-g64", "q8_0"),
    ("int3-g64", "q4_0"),
    ("int2-g64-asym", "int4-g32-asym"),
    ("int4", "int4-g32"),
    ("int8-tensor", "int8-g32"),
    ("int4-g32:bf16", "int4-g32:f32"),
    ("int4-g32", "int4-g32:f32"),
    ("mxfp4", "mxfp4"),
    ("q4_0", "f32"),
]
NOT_HELD = [
    ("int4-g32", "int4-g64"),
    ("int8-g32", "int4-g32"),
    ("int4-g32:f32", "int4-g32"),
    ("int4-g32-asym", "int4-g32"),
    ("iq4_nl", "q8_0"),
    ("q4_k", "q4_0"),
    ("q8_0", "f16"),
    ("int4-g32", "int4-g256"),
]


@pytest.mark.parametrize(("source", "target"), HELD)
def test_values_that_a_grid_holds_are_moved_exactly(source: str, target: str) -> None:
    q = nearest(W, grid_named(source))
    found = recast(q, grid_named(target))
    assert found is not None
    assert found.grid == grid_named(target)
    assert torch.equal(found.dequantize(), q.dequantize())


@pytest.mark.parametrize(("source", "target"), NOT_HELD[:-2])
def test_values_that_it_does_not_hold_are_not(source: str, target: str) -> None:
    wide = torch.cat([W, W], dim=1)  # whole superblocks
    assert recast(nearest(wide, grid_named(source)), grid_named(target)) is None


def test_a_minimum_that_is_a_multiple_of_its_scale_is_a_zero_point() -> None:
    grid = grid_named("q4_1")
    codes = torch.randint(0, 16, (2, 64), dtype=torch.uint8)
    scale = torch.full((2, 2), 0.25).half()
    q = QuantizedTensor(grid, (2, 64), codes, {"scale": scale, "minimum": -3 * scale})
    found = recast(q, grid_named("int4-g32-asym"))
    assert found is not None
    assert torch.equal(found.codes, codes)
    assert (found.params["zero"] == 3).all()
    back = recast(found, grid)
    assert back is not None
    assert torch.equal(back.params["minimum"], q.params["minimum"])
    off = QuantizedTensor(grid, (2, 64), codes, {"scale": scale, "minimum": -3.5 * scale})
    assert recast(off, grid_named("int4-g32-asym")) is None


def test_a_group_index_stays() -> None:
    base, wider = grid_named("int4-g32"), grid_named("int4-g32-asym")
    assert isinstance(base, Scaled)
    assert isinstance(wider, Scaled)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    plain = nearest(W, Indexed(base))
    q = QuantizedTensor(Indexed(base), plain.shape, plain.codes, {**plain.params, INDEX: plain.params[INDEX][order]})
    found = recast(q, Indexed(wider))
    assert found is not None
    assert torch.equal(found.dequantize(), q.dequantize())
    assert recast(q, base) is None


def test_the_first_that_holds_it_is_taken() -> None:
    q = nearest(W, grid_named("int4-g128"))
    found = first_exact(q, [grid_named(name) for name in ("int3-g128", "q4_0", "q8_0")])
    assert found is not None
    assert found.grid == grid_named("q4_0")
    assert first_exact(q, [grid_named("int2")]) is None


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), more=st.integers(0, 6), size=st.sampled_from([32, 64]), seed=st.integers(0, 999))
def test_more_bits_and_smaller_groups_hold_fewer_and_larger(bits: int, more: int, size: int, seed: int) -> None:
    W = torch.randn(3, 128, generator=torch.Generator().manual_seed(seed))
    q = nearest(W, grid_named(f"int{bits}-g{size}"))
    found = recast(q, grid_named(f"int{min(8, bits + more)}-g32-asym"))
    assert found is not None
    assert torch.equal(found.dequantize(), q.dequantize())
