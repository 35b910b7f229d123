import pytest
import torch

from whit.errors import RecipeError
from whit.grids.named import GRIDS
from whit.grids.scaled import Scaled
from whit.rounding.named import ROUNDINGS, rounding_named
from whit.rounding.nearest import nearest, search


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=gen) ** 3 * 0.01


def group_errors(W: torch.Tensor, Q: torch.Tensor, importance: torch.Tensor, size: int) -> torch.Tensor:
    return ((Q - W) ** 2 * importance).reshape(-1, size).sum(-1)


@pytest.mark.parametrize("name", [n for n, g in GRIDS.items() if isinstance(g, Scaled)])
def test_search_is_never_worse_than_nearest_in_any_group(name: str) -> None:
    W = heavy_tailed(6, 256)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4
    grid = GRIDS[name]
    size = W.numel() if not grid.row_independent else grid.spans(256)[0]
    plain = group_errors(W, nearest(W, grid).dequantize(), importance, size)
    searched = group_errors(W, search(W, grid, importance).dequantize(), importance, size)
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < plain.sum()


def test_search_finds_the_best_scale_of_a_small_group() -> None:
    grid = GRIDS["q4_0"]
    W = heavy_tailed(20, 32, seed=3)
    found = ((search(W, grid, torch.ones(32)).dequantize() - W) ** 2).sum(-1)
    largest = W.abs().amax(1, keepdim=True)
    fine = [{"scale": (largest * f).half()} for f in torch.linspace(-0.3, 0.3, 4001)]
    best = torch.stack([((grid.decode(grid.round(W, p), p) - W) ** 2).sum(-1) for p in fine]).amin(0)
    assert (found.sum() / best.sum()) < 1.05


def test_search_spends_precision_where_the_importance_is() -> None:
    W = heavy_tailed(16, 128)
    importance = torch.ones(128)
    importance[::16] = 1000
    blind, aware = (
        search(W, GRIDS["q4_0"], torch.ones(128)).dequantize(),
        search(W, GRIDS["q4_0"], importance).dequantize(),
    )
    important = slice(None, None, 16)
    assert ((aware - W)[:, important] ** 2).sum() < 0.7 * ((blind - W)[:, important] ** 2).sum()


@pytest.mark.parametrize("name", ["q4_0", "q5_1", "iq4_nl", "int3-asym", "f16"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_any_split_into_rows_gives_the_same_codes(name: str, rounding: str) -> None:
    W = heavy_tailed(40, 64)
    whole = ROUNDINGS[rounding](W, GRIDS[name])
    parts = [ROUNDINGS[rounding](part, GRIDS[name]) for part in W.split([1, 7, 32])]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))


def test_large_matrices_are_rounded_as_small_ones() -> None:
    W = heavy_tailed(300, 1024)  # more than one slice
    assert torch.equal(nearest(W, GRIDS["q4_1"]).codes[150:], nearest(W[150:], GRIDS["q4_1"]).codes)


def test_one_scale_for_the_tensor_sees_the_whole_tensor() -> None:
    W = heavy_tailed(600, 512)
    assert nearest(W, GRIDS["int8-tensor"]).params["scale"].shape == (1, 1)


def test_an_unknown_rounding_lists_those_there_are() -> None:
    with pytest.raises(RecipeError, match="Known roundings: nearest, search"):
        rounding_named("gptq")


@pytest.mark.parametrize("name", ["q4_1", "q5_1", "q4_0", "q8_0"])
def test_groups_of_nearly_one_value_near_the_limit_do_not_overflow(name: str) -> None:
    """A straight line through points that lie on each other may be as steep as it likes: it is not a fit."""
    noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    for size in (1.0, 6e4 if name.endswith("1") else 2e5):
        W = size * (1 + 1e-6 * noise)
        found = search(W, GRIDS[name], torch.rand(32) + 1e-3).dequantize()
        assert torch.isfinite(found).all()
        assert (found - W).abs().max() < 0.1 * size
