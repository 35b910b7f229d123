"""Ranges cut by the divergence of the weights' distribution."""

from __future__ import annotations

import pytest
import torch

from whit.errors import RecipeError
from whit.grids.named import grid_named
from whit.grids.scaled import Scaled
from whit.recipes.recipe import Rule
from whit.rounding.density import CUTS, cut, divergence, kl
from whit.rounding.nearest import nearest


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_a_distribution_that_levels_hold_exactly_diverges_by_smoothing_alone() -> None:
    P = torch.full((1, 8), 1 / 8)
    codes, inside = torch.arange(8)[None] // 2, torch.ones(1, 8)
    assert divergence(P, codes, inside, 4).item() == pytest.approx(0, abs=1e-6)


def test_it_is_the_divergence_of_the_definition() -> None:
    P = torch.tensor([[0.1, 0.3, 0.2, 0.4]])
    codes, inside = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    Q = torch.tensor([0.2, 0.2, 0.6, 0.0]) * (1 - 1e-4) + 1e-4 / 4
    assert divergence(P, codes, inside, 2).item() == pytest.approx((P[0] * (P[0] / Q).log()).sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["int2-asym", "int3", "int4-g64", "int4-g32-min", "int3-tensor", "nf4-g64", "mxfp4"])
def test_the_range_is_one_of_the_cuts(name: str) -> None:
    grid, W = grid_named(name), normal(6, 128)
    assert isinstance(grid, Scaled)
    params, found = cut(W, grid), kl(W, grid)
    assert {key: value.tolist() for key, value in params.items()} == {k: v.tolist() for k, v in found.params.items()}
    blocks = W.view(1, -1) if "tensor" in name else W.view(-1, grid.spans(128)[0])
    limits = blocks.abs().amax(1, keepdim=True)
    every = [grid.fit(blocks.clamp(-share * limits, share * limits).view(W.shape)) for share in CUTS]
    same = torch.stack([grid.store(each)["scale"].float() == params["scale"].float() for each in every])
    assert same.any(0).all()


def test_even_weights_are_not_cut_and_outliers_are() -> None:
    grid = grid_named("int3-asym")
    assert isinstance(grid, Scaled)
    even = torch.linspace(-1, 1, 4096)[None]
    assert torch.equal(cut(even, grid)["scale"], grid.store(grid.fit(even))["scale"])
    tailed = normal(1, 4096)
    tailed[0, 0] = 1.0
    assert (cut(tailed, grid)["scale"] < 0.5 * grid.store(grid.fit(tailed))["scale"]).all()


def test_the_distribution_comes_nearer_where_few_levels_meet_long_tails() -> None:
    W, grid = normal(4, 4096) ** 3, grid_named("int3-asym")
    bins = torch.linspace(float(W.min()), float(W.max()), 9)

    def shares(Q: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(Q, bins).flatten().bincount(minlength=10).double() / Q.numel()

    plain, cut_ = (shares(each(W, grid).dequantize()) for each in (nearest, kl))
    assert (cut_ - shares(W)).abs().sum() <= (plain - shares(W)).abs().sum() + 1e-9


def test_zeros_and_single_values_stay_finite() -> None:
    grid = grid_named("int4-g32-asym")
    for W in (torch.zeros(2, 64), torch.full((2, 64), 0.5), torch.full((2, 64), -1e-30)):
        assert torch.isfinite(kl(W, grid).dequantize()).all()


def test_grids_without_a_range_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="ranges of scales"):
        Rule("*", "kmeans4", "kl")
    with pytest.raises(ValueError, match="range of scales"):
        kl(normal(2, 64), grid_named("kmeans4"))
    assert torch.equal(kl(normal(2, 64), grid_named("f32")).codes, normal(2, 64))
