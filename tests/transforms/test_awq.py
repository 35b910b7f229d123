"""Factors for columns: a loss that does not notice them, taken where they help and left where they do not."""

from __future__ import annotations

import pytest
import torch

from whit.grids.named import GRIDS
from whit.rounding.curvature import curvature
from whit.rounding.feedback import feedback
from whit.rounding.polish import loss
from whit.transforms.awq import ROWS, column_factors, sampled

COLS = 256


def inputs(spread: float, seed: int = 0) -> torch.Tensor:
    """H of 1000 correlated tokens whose channels differ in size by e^(+-spread)."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(1000, COLS, generator=generator) @ (
        torch.eye(COLS) + torch.randn(COLS, COLS, generator=generator) / 32
    )
    X *= (spread * torch.randn(COLS, generator=generator)).exp()
    return X.T @ X / 1000


def weights(spread: float, rows: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, COLS, generator=generator) * (spread * torch.randn(COLS, generator=generator)).exp()


def test_the_loss_and_the_factor_follow_the_columns() -> None:
    W, c = weights(0.3), curvature(inputs(0.5))
    t = torch.randn(COLS, generator=torch.Generator().manual_seed(2)).exp()
    scaled, Q = c.rescaled(t, damping=0.0), W + 0.01 * weights(0.1)
    torch.testing.assert_close(loss(W * t, Q * t, scaled.H), loss(W, Q, c.H), rtol=1e-4, atol=0)
    mean = scaled.H.diagonal().mean()
    torch.testing.assert_close(c.rescaled(t, damping=0.5).H, scaled.H + 0.5 * mean * torch.eye(COLS), rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.R @ scaled.R.T, scaled.H, rtol=1e-4, atol=1e-4 * scaled.H.abs().max().item())
    assert torch.equal(scaled.R, scaled.R.triu())


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q2_k", "iq4_xs"])
def test_uneven_columns_are_evened_and_all_rows_gain(name: str) -> None:
    W, c, grid = weights(0.8), curvature(inputs(0.5)), GRIDS[name]
    t = column_factors(sampled([(W, grid)]), c, torch.arange(COLS))
    assert t is not None
    scaled = c.rescaled(t)
    after = loss(W * t, feedback(W * t, grid, scaled).dequantize(), scaled.H).sum()
    assert after < 0.8 * loss(W, feedback(W, grid, c).dequantize(), c.H).sum()


def test_even_columns_are_left_alone() -> None:
    W, c = weights(0.0, rows=ROWS), curvature(torch.eye(COLS))
    W /= W.square().mean(0).sqrt()
    assert column_factors(sampled([(W, GRIDS["q4_0"])]), c, torch.arange(COLS)) is None


def test_columns_of_one_channel_have_one_factor_and_dead_ones_a_finite_one() -> None:
    W, H = weights(0.8), inputs(0.5)
    W[:, 3], H[:, 5], H[5, :] = 0, 0, 0
    t = column_factors(sampled([(W, GRIDS["q4_0"])]), curvature(H), torch.arange(COLS) // 2)
    assert t is not None
    assert t.shape == (COLS // 2,)
    assert torch.isfinite(t).all()
    assert (t > 0).all()


def test_samples_stand_for_all_rows_and_are_put_together_by_grid() -> None:
    wide, small = weights(0.5, rows=640), weights(0.5, rows=10)
    first, second = sampled([(wide, GRIDS["q4_0"]), (small, GRIDS["q8_0"]), (small, GRIDS["q4_0"])])
    assert first.W.shape == (ROWS + 10, COLS)
    assert first.weight.sum().item() == pytest.approx(650)
    assert torch.equal(second.W, small)
    assert second.weight.tolist() == [1.0] * 10
