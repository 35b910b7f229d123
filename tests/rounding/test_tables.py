"""Feedback, refit and descent on tables of levels: closed forms, brute force, and losses that may not rise."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whit.grids.codebook import Codebook
from whit.grids.grid import Adaptive
from whit.grids.named import grid_named
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import PerTensor, Scaled
from whit.rounding.curvature import Curvature, curvature
from whit.rounding.feedback import feedback
from whit.rounding.methods import Effort, rounded
from whit.rounding.nearest import nearest, search
from whit.rounding.polish import loss
from whit.rounding.tables import refit, table_feedback, table_polish

NAMES = [f"kmeans{bits}{share}" for bits in (1, 2, 3, 4) for share in ("", "-g32", "-tensor")]


def layer(seed: int, rows: int = 12, cols: int = 96, tokens: int = 400) -> tuple[Tensor, Curvature]:
    """Weights with heavy tails, and the curvature of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, 12, generator=generator) @ torch.randn(12, cols, generator=generator)
    X += 0.5 * torch.randn(tokens, cols, generator=generator)
    W = torch.randn(rows, cols, generator=generator) * torch.rand(rows, cols, generator=generator).pow(-0.3) * 0.02
    return W, curvature((X.T @ X / tokens).double())


def losses(W: Tensor, quantized: QuantizedTensor, c: Curvature) -> Tensor:
    return loss(W.double(), quantized.dequantize().double(), c.H.double())


@pytest.mark.parametrize("name", NAMES)
def test_feedback_polish_and_refit_each_lower_the_loss(name: str) -> None:
    grid = grid_named(name)
    assert isinstance(grid, Codebook)
    W, c = layer(1)
    plain, fed = search(W, grid, c.H.diagonal()), table_feedback(W, grid, c)
    fitted, polished = refit(W, fed, grid, c), table_polish(W, fed, grid, c, 3)
    chain = [losses(W, each, c) for each in (plain, fed, fitted, polished)]
    assert chain[1].sum() < 0.85 * chain[0].sum()
    assert chain[2].sum() <= chain[1].sum()
    assert chain[3].sum() < 0.97 * chain[1].sum()
    if grid.row_independent:
        assert (chain[2] <= chain[1] * (1 + 1e-5)).all()
        assert (chain[3] <= chain[2] * (1 + 1e-5)).all()
    for each in (fed, fitted, polished):
        ascending = each.params["levels"].float().view(-1, grid.n_levels).diff(dim=1)
        assert (ascending >= 0).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_diagonal_curvature_gives_weighted_k_means(bits: int) -> None:
    W, _ = layer(2)
    H = torch.rand(96, generator=torch.Generator().manual_seed(0)).pow(3) + 0.01
    c = Curvature(H.diag(), H.sqrt().diag())
    grid = Codebook(bits)
    fed, plain = table_feedback(W, grid, c), search(W, grid, H)
    assert torch.equal(fed.params["levels"], plain.params["levels"])
    assert torch.equal(fed.codes, plain.codes)


@pytest.mark.parametrize("name", NAMES)
def test_refit_is_the_solution_of_the_linear_system(name: str) -> None:
    """(P^T H P) c = P^T H w for every table, solved outright in float64."""
    grid = grid_named(name)
    assert isinstance(grid, Codebook)
    W, c = layer(3, rows=4)
    H = (c.H + c.H.diagonal().mean() * torch.eye(96) * 0.3).double()
    c = Curvature(H.float(), torch.linalg.cholesky(H).float())
    start = nearest(W, grid)
    index = grid.index(start.codes)
    n_tables, n = start.params["levels"].shape
    rows_each = W.shape[0] // n_tables
    best = 0.0
    for t in range(n_tables):
        P = torch.zeros(rows_each, 96, n, dtype=torch.float64)
        P.view(-1, n).scatter_(1, index[t][:, None], 1.0)
        A = torch.einsum("rin,ij,rjm->nm", P, H, P)
        w = W[t * rows_each : (t + 1) * rows_each].double()
        b = torch.einsum("rin,ij,rj->n", P, H, w)
        found = torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
        away = P @ found - w
        best += torch.einsum("ri,ij,rj->", away, H, away).item()
    got = losses(W, refit(W, start, grid, c), c).sum().item()
    assert got == pytest.approx(best, rel=0.02)
    assert got >= best * (1 - 1e-4)


@given(st.integers(0, 200))
@settings(max_examples=25, deadline=None)
def test_brute_force_is_the_bound(seed: int) -> None:
    """One row of six weights, two levels: all assignments, each with its best levels."""
    W, c = layer(seed, rows=1, cols=6, tokens=40)
    H, w, best = c.H.double(), W[0].double(), float("inf")
    for bits in itertools.product((0.0, 1.0), repeat=6):
        P = torch.tensor([[1 - bit, bit] for bit in bits], dtype=torch.float64)
        levels = torch.linalg.lstsq(P.T @ H @ P, (P.T @ H @ w)[:, None], driver="gelsd").solution[:, 0]
        away = P @ levels - w
        best = min(best, (away @ H @ away).item())
    grid = Codebook(1)
    polished = table_polish(W, table_feedback(W, grid, c), grid, c, 4)
    assert losses(W, polished, c).item() >= best * (1 - 1e-3)
    assert losses(W, polished, c).item() <= losses(W, search(W, grid, c.H.diagonal()), c).item() * 3 + 1e-9


def test_levels_follow_what_matters_to_the_model() -> None:
    W, c = layer(5)
    importance = c.H.diagonal().expand(12, -1).clone()
    importance[:, ::2] *= 100
    grid = Codebook(2)
    evenly, weighed = table_feedback(W, grid, c), table_feedback(W, grid, c, importance)
    errors = [(each.dequantize() - W)[:, ::2].square().sum() for each in (evenly, weighed)]
    assert errors[1] < errors[0]
    assert torch.equal(table_feedback(W, grid, c, torch.zeros_like(W)).codes, evenly.codes)


@pytest.mark.parametrize("name", [*NAMES, "kmeans8"])
def test_the_method_is_never_worse_than_plain_rounding(name: str) -> None:
    grid = grid_named(name)
    W, c = layer(6)
    found, plain = rounded("feedback", W, grid, c, Effort(sweeps=1))  # type: ignore[arg-type]
    assert isinstance(found.quantized, QuantizedTensor)
    if grid.row_independent:
        assert (found.loss <= plain.loss).all()
    assert found.loss.sum() <= plain.loss.sum()


def test_published_feedback_keeps_the_levels_of_the_weights() -> None:
    W, c = layer(7)
    grid = Codebook(3)
    found, _ = rounded("gptq", W, grid, c, Effort())  # type: ignore[arg-type]
    assert torch.equal(found.quantized.params["levels"], grid.store(grid.fit(W))["levels"])
    assert losses(W, found.quantized, c).sum() < losses(W, nearest(W, grid), c).sum()


def test_rows_do_not_see_each_other_but_share_the_table_of_a_matrix() -> None:
    W, c = layer(8)
    grid = Codebook(3)
    together = table_polish(W, table_feedback(W, grid, c), grid, c, 1).dequantize()
    apart = [table_polish(row, table_feedback(row, grid, c), grid, c, 1).dequantize() for row in W.split(1)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-3)
    shared = table_polish(W, table_feedback(W, Codebook(3, PerTensor()), c), Codebook(3, PerTensor()), c, 1)
    assert len(shared.dequantize().unique()) <= 8


def test_one_scale_of_a_matrix_is_rounded_with_feedback_too() -> None:
    W, c = layer(9)
    grid = grid_named("int4-tensor")
    assert isinstance(grid, Scaled)
    assert not grid.row_independent
    fed = feedback(W, grid, c)
    found, plain = rounded("feedback", W, grid, c, Effort(sweeps=2))
    assert found.loss.sum() < losses(W, fed, c).sum() < plain.loss.sum()


def test_groups_must_divide_the_rows() -> None:
    W, c = layer(10)
    grid: Codebook | Adaptive = Codebook(2, grid_named("int4-g64").scheme)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="do not divide"):
        feedback(W, grid, c)
