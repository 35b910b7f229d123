"""Feedback with outliers beside the codes: what the outliers' values are, and that nothing gets worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whit.grids.codebook import Codebook
from whit.grids.scaled import PerGroup
from whit.grids.sparse import COLUMNS, VALUES, Sparse
from whit.rounding.curvature import curvature
from whit.rounding.methods import METHODS, Effort, rounded
from whit.rounding.nearest import nearest
from whit.rounding.outliers import refit_outliers, sparse_feedback, sparse_polish
from whit.rounding.polish import loss

GRIDS = [Sparse(Codebook(3), 0.02), Sparse(Codebook(2, PerGroup(32)), 0.05)]


def layer(rows: int = 24, cols: int = 128) -> tuple[Tensor, Tensor]:
    """Weights with a heavy tail, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, cols, 4, generator=generator)
    X = torch.randn(600, 16, generator=generator) @ torch.randn(16, cols, generator=generator)
    X += 0.3 * torch.randn(600, cols, generator=generator)
    return x[..., 0] / x[..., 1:].square().mean(-1).sqrt(), X.T @ X / 600


@pytest.mark.parametrize("grid", GRIDS)
def test_refitted_values_are_the_least_squares_solution(grid: Sparse) -> None:
    """In float64, row by row, with a factor of H as the matrix of the problem."""
    W, H = layer()
    c = curvature(H)
    found = refit_outliers(W, nearest(W, grid), grid, c.H)
    L = torch.linalg.cholesky(c.H.double())  # E = |(q - w) L|^2
    rest = found.dequantize().double() - grid.beside(found.params, W.shape[1]).double()
    for row in range(len(W)):
        at = found.params[COLUMNS][row].long()
        best = torch.linalg.lstsq(L[at].T, ((W[row].double() - rest[row]) @ L)[:, None]).solution[:, 0]
        assert torch.allclose(found.params[VALUES][row].double(), best, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS)
def test_no_step_raises_the_loss_of_a_row(grid: Sparse) -> None:
    W, H = layer()
    c = curvature(H)
    first = sparse_feedback(W, grid, c)
    second = sparse_polish(W, first, grid, c, 2)
    before, after = (loss(W, each.dequantize(), c.H) for each in (first, second))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_loses_less_than_without_outliers(name: str) -> None:
    W, H = layer()
    c, F = curvature(H), torch.rand(24, 128, generator=torch.Generator().manual_seed(1))
    found, _ = rounded(name, W, Sparse(Codebook(3), 0.02), c, Effort(sweeps=1), F)
    without, _ = rounded(name, W, Codebook(3), c, Effort(sweeps=1), F)
    assert found.loss.sum() < 0.8 * without.loss.sum()
