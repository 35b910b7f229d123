import pytest
import torch

from whit.grids.indexed import Indexed
from whit.grids.named import GRIDS, grid_named
from whit.grids.scaled import Scaled
from whit.layouts.native import Native
from whit.rounding.nearest import nearest

W = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in ("f32", "f16", "bf16")])
def test_every_grid_comes_back_as_it_was(name: str) -> None:
    grid = grid_named(name)
    q = nearest(W, grid)
    parts = Native().pack(q)
    for key, spec in Native().schema(grid, (4, 256)).items():
        assert (tuple(parts[key].shape), parts[key].dtype) == (spec.shape, spec.dtype)
    back = Native().unpack(parts, grid)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())


def test_a_group_index_travels_along() -> None:
    base = grid_named("int4-g32-asym")
    assert isinstance(base, Scaled)
    q = nearest(W, Indexed(base))
    assert torch.equal(Native().unpack(Native().pack(q), Indexed(base)).dequantize(), q.dequantize())


def test_plain_floats_are_not_codes() -> None:
    assert "not stored" in str(Native().refuses(grid_named("f16"), (4, 256)))
    assert "256" in str(Native().refuses(grid_named("q4_k"), (4, 64)))
    with pytest.raises(ValueError, match="not stored"):
        Native().pack(nearest(W, grid_named("f16")))
