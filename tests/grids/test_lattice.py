import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whit.grids.lattice import SIZE, Lattice, _points
from whit.grids.named import GRIDS
from whit.rounding.curvature import curvature
from whit.rounding.feedback import feedback
from whit.rounding.methods import Effort, rounded
from whit.rounding.nearest import nearest, search
from whit.rounding.polish import loss, polish

NAMES = [name for name, grid in GRIDS.items() if isinstance(grid, Lattice)]


def lattice(name: str) -> Lattice:
    grid = GRIDS[name]
    assert isinstance(grid, Lattice)
    return grid


def weights(seed: int, rows: int = 6, cols: int = 512) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def metric(seed: int, n: int) -> Tensor:
    A = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(seed))
    return A @ A.T / n + 0.3 * torch.eye(n)


def legal(grid: Lattice) -> Tensor:
    """All patterns of signs of one step."""
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=grid.step)))
    return signs[signs.prod(1) > 0] if grid.parity else signs


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_nearest_point_is_that_of_brute_force_but_for_bound_signs(name: str, seed: int) -> None:
    grid = lattice(name)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, grid.step, generator=generator) * 0.6 * _points(name).max()
    w = torch.rand(40, grid.step, generator=generator) + 0.1
    found = grid.values(grid.nearest(x, w))
    for part in range(grid.parts):  # given the signs that were chosen, every point is the best one
        own = slice(part * grid.width, (part + 1) * grid.width)
        sign = torch.where(found[:, own] < 0, -1.0, 1.0)
        errors = (w[:, None, own] * (x[:, None, own] - sign[:, None] * _points(name)).square()).sum(-1)
        chosen = (w[:, own] * (x[:, own] - found[:, own]).square()).sum(-1)
        torch.testing.assert_close(chosen, errors.amin(1), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in NAMES if lattice(name).parts == 1])
def test_under_a_metric_the_choice_is_near_that_of_brute_force(name: str) -> None:
    grid = lattice(name)
    P = metric(1, grid.step)
    x = torch.randn(12, grid.step, generator=torch.Generator().manual_seed(2)) * 0.5 * _points(name).max()
    signed = (_points(name)[:, None] * legal(grid)).view(-1, grid.step)  # every value that a code can stand for
    best = torch.stack([torch.linalg.vecdot((signed - each) @ P, signed - each).min() for each in x])
    delta = grid.values(grid.nearest_under(x, P)) - x
    found = torch.linalg.vecdot(delta @ P, delta)
    assert (found >= best * (1 - 1e-4)).all()
    assert found.sum() < 1.15 * best.sum()


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_minus_signs_is_legal(name: str) -> None:
    grid = lattice(name)
    for codes in (
        grid.nearest(*torch.randn(2, 500, grid.step).abs()),
        grid.nearest_under(torch.randn(500, grid.step) * 20, metric(3, grid.step)),
    ):
        odd = (grid.values(codes) < 0).sum(1) % 2
        assert not (grid.parity and odd.any())


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_search_is_never_worse_than_the_range_rule_in_any_superblock(name: str, seed: int) -> None:
    W, w = weights(seed), torch.rand(512, generator=torch.Generator().manual_seed(seed)) + 0.1
    plain, found = nearest(W, GRIDS[name]), search(W, GRIDS[name], w)
    before, after = (((each.dequantize() - W).square() * w).view(6, -1, SIZE).sum(-1) for each in (plain, found))
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("name", NAMES)
def test_a_late_choice_never_makes_its_sub_block_worse_and_leaves_the_others(name: str) -> None:
    grid = lattice(name)
    moved, params = weights(4, cols=SIZE) * 1.3, grid.search(weights(3, cols=SIZE), None)
    for inner in range(SIZE // grid.sub):
        span = slice(inner * grid.sub, (inner + 1) * grid.sub)
        new = grid.late(moved[:, span], torch.ones(grid.sub), params, inner)
        before, after = (
            (grid.decode(grid.round(moved, each), each) - moved)[:, span].square().sum(1) for each in (params, new)
        )
        assert (after <= before * (1 + 1e-6)).all()
        kept = [j for j in range(SIZE // grid.sub) if j != inner]
        assert torch.equal(params["sub_scale"][:, kept], new["sub_scale"][:, kept])


@pytest.mark.parametrize("name", NAMES)
def test_feedback_in_steps_beats_weights_alone_and_polish_never_loses(name: str) -> None:
    grid, W = lattice(name), weights(5, rows=24)
    generator = torch.Generator().manual_seed(6)
    X = torch.randn(2000, 512, generator=generator) @ (torch.randn(512, 512, generator=generator) / 8)
    c = curvature(X.T @ X / 2000)
    alone = loss(W, rounded("weighted", W, grid, c, Effort())[0].quantized.dequantize(), c.H).sum()
    fed = feedback(W, grid, c)
    first = loss(W, fed.dequantize(), c.H)
    second = loss(W, polish(W, fed, grid, c, sweeps=2).dequantize(), c.H)
    assert first.sum() < 0.8 * alone
    assert (second <= first * (1 + 1e-5)).all()
    assert second.sum() < 0.98 * first.sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0, 1e3])
def test_zero_tiny_and_large_rows_stay_finite(name: str, scale: float) -> None:
    W = weights(7) * scale
    quantized = rounded("feedback", W, lattice(name), curvature(torch.eye(512)), Effort(1))[0].quantized
    assert torch.isfinite(quantized.dequantize()).all()
    if scale == 0:
        assert not quantized.dequantize().any()


def test_rows_that_are_not_whole_superblocks_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 300 weights do not divide into superblocks of 256"):
        lattice("iq2_xs").schema((2, 300))
