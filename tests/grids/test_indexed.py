import pytest
import torch

from whit.grids.grid import Grid
from whit.grids.indexed import INDEX, Indexed
from whit.grids.named import grid_named
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import Scaled
from whit.rounding.nearest import nearest, search

W = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) + 0.2


def indexed(name: str) -> Indexed:
    base = grid_named(name)
    assert isinstance(base, Scaled)
    return Indexed(base)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym", "int8-g64"])
@pytest.mark.parametrize("rounding", [nearest, search])
def test_with_groups_of_neighbours_it_is_the_plain_grid(name: str, rounding) -> None:
    grid: Grid = indexed(name)
    found, plain = rounding(W, grid), rounding(W, grid_named(name))
    assert torch.equal(found.dequantize(), plain.dequantize())


def test_a_shuffled_index_shuffles_the_columns() -> None:
    grid = indexed("int4-g32-asym")
    plain = nearest(W, grid)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    params = {**plain.params, INDEX: plain.params[INDEX][order]}
    shuffled = QuantizedTensor(grid, (4, 128), plain.codes[:, order].contiguous(), params)
    assert torch.equal(shuffled.dequantize(), plain.dequantize()[:, order])
    assert torch.equal(grid.round(W[:, order], params), shuffled.codes)


def test_the_last_group_may_be_short() -> None:
    found = nearest(W[:, :80], indexed("int4-g32"))
    assert found.params["scale"].shape == (4, 3)
    assert (found.dequantize() - W[:, :80]).abs().max() < 0.5


def test_only_groups_with_integer_offsets_can_be_indexed() -> None:
    with pytest.raises(ValueError, match="groups"):
        indexed("int4")
    with pytest.raises(ValueError, match="groups"):
        indexed("q4_1")
