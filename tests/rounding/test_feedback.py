"""Error feedback and polish against the published push form, closed forms and brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whit.grids.levels import Integers
from whit.grids.named import GRIDS
from whit.grids.scaled import PerChannel, PerGroup, Scaled
from whit.rounding.curvature import Curvature, curvature
from whit.rounding.feedback import feedback
from whit.rounding.methods import Effort, rounded
from whit.rounding.nearest import nearest, search
from whit.rounding.polish import better_rows, loss, polish, scored

ADAPTIVE = [
    "q4_0",
    "q4_1",
    "q5_1",
    "q8_0",
    "iq4_nl",
    "q2_k",
    "q3_k",
    "q4_k",
    "q6_k",
    "iq4_xs",
    "int3-g128-asym",
    "int4",
]


def layer(seed: int, rows: int = 16, cols: int = 256, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """Weights, and second moments of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, 24, generator=generator) @ torch.randn(24, cols, generator=generator)
    X += 0.5 * torch.randn(tokens, cols, generator=generator)
    X *= torch.exp(0.7 * torch.randn(cols, generator=generator))
    return torch.randn(rows, cols, generator=generator) * 0.02, (X.T @ X / tokens).double()


@pytest.mark.parametrize("name", ADAPTIVE)
def test_without_dependence_between_inputs_feedback_is_weighted_nearest_rounding(name: str) -> None:
    W, H = layer(0)
    diagonal = Curvature(H.diagonal().float().diag(), H.diagonal().sqrt().float().diag())
    fed, plain = feedback(W, GRIDS[name], diagonal, late=False), search(W, GRIDS[name], diagonal.R.diagonal().square())
    assert torch.equal(fed.codes, plain.codes)
    assert all(torch.equal(fed.params[key], plain.params[key]) for key in plain.params)


def test_the_pull_form_gives_the_codes_of_the_published_push_form() -> None:
    W, H = layer(1, cols=96)
    grid = Scaled(Integers(4, 8), PerChannel(), scale_dtype=torch.float32)
    c = curvature(H)
    ours = feedback(W, grid, c, scales="range")
    scale = ours.params["scale"].double()
    U = torch.linalg.cholesky(torch.linalg.inv(c.H.double()), upper=True)
    work, codes = W.double().clone(), torch.zeros(W.shape, dtype=torch.uint8)
    for i in range(W.shape[1]):
        codes[:, i] = grid.levels.nearest(work[:, i : i + 1] / scale)[:, 0]
        error = (work[:, i] - (codes[:, i].double() - 8) * scale[:, 0]) / U[i, i]
        work[:, i:] -= error[:, None] * U[i, i:]
    assert (ours.codes == codes).float().mean() > 0.999  # float32 against float64: a tie may fall either way


def test_the_loss_is_the_sum_over_steps() -> None:
    W, H = layer(2, cols=64)
    c = curvature(H)
    grid = GRIDS["q4_0"]
    Q = feedback(W, grid, c).dequantize().double()
    R = c.R.double()
    errors = W.double() - Q
    targets = W.double() + (errors @ R.triu(1)) / R.diagonal()
    steps = ((Q - targets) ** 2 * R.diagonal() ** 2).sum(1)
    whole = torch.linalg.vecdot(errors @ (R @ R.T), errors)
    torch.testing.assert_close(steps, whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("kind", ["ordinary", "few tokens", "equal columns", "one direction", "never active"])
def test_no_row_is_worse_than_plain_rounding(name: str, kind: str) -> None:
    W, H = layer(3)
    if kind == "few tokens":
        H = layer(3, tokens=5)[1]
    elif kind == "equal columns":
        H[:, 1], H[1] = H[:, 0], H[0]
        H[1, 1] = H[0, 0]
    elif kind == "one direction":
        x = torch.randn(256, generator=torch.Generator().manual_seed(0)).double()
        H = torch.outer(x, x)
    elif kind == "never active":
        H = torch.zeros_like(H)
    c = curvature(H)
    quantized, plain = rounded("feedback", W, GRIDS[name], c, Effort())[0].quantized, nearest(W, GRIDS[name])
    after, before = loss(W, quantized.dequantize(), c.H), loss(W, plain.dequantize(), c.H)
    assert torch.isfinite(quantized.dequantize()).all()
    assert (after <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ADAPTIVE)
def test_feedback_and_polish_each_lower_the_loss_of_a_layer(name: str) -> None:
    W, H = layer(4)
    c = curvature(H)
    grid = GRIDS[name]
    weighted, fed = rounded("weighted", W, grid, c, Effort())[0].quantized, feedback(W, grid, c)
    polished = polish(W, fed, grid, c, 2)
    first, second, third = (loss(W, each.dequantize(), c.H).sum() for each in (weighted, fed, polished))
    assert second < 0.8 * first
    assert third < second


@pytest.mark.parametrize("name", ADAPTIVE)
@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_polish_never_raises_the_loss_of_a_row(name: str, seed: int) -> None:
    W, H = layer(seed, rows=8)
    c = curvature(H)
    start = search(W, GRIDS[name], c.H.diagonal())
    polished = polish(W, start, GRIDS[name], c, 3)
    before, after = (loss(W, each.dequantize(), c.H) for each in (start, polished))
    assert (after <= before * (1 + 1e-5)).all()


def test_polish_finds_what_brute_force_finds_more_often_than_feedback_does() -> None:
    grid = Scaled(Integers(2, 2), PerGroup(6), scale_dtype=torch.float32)
    fed_total, polished_total, best_total = 0.0, 0.0, 0.0
    for seed in range(40):
        W, H = layer(seed, rows=1, cols=6, tokens=30)
        c = curvature(H)
        start = feedback(W, grid, c, scales="range")
        fed = loss(W, start.dequantize(), c.H).item()
        polished = loss(W, polish(W, start, grid, c, 4).dequantize(), c.H).item()
        scale = start.params["scale"].item()
        choices = torch.tensor(list(itertools.product((-2.0, -1.0, 0.0, 1.0), repeat=6))) * scale
        best = loss(W, choices, c.H).min().item()
        assert polished <= fed * (1 + 1e-5)
        assert fed >= best * (1 - 1e-5)
        fed_total, polished_total, best_total = fed_total + fed, polished_total + polished, best_total + best
    assert polished_total < fed_total


def test_refit_alone_is_least_squares() -> None:
    W, H = layer(5, rows=4, cols=32)
    grid = Scaled(Integers(4, 8), PerGroup(32), scale_dtype=torch.float32)
    c = curvature(H)
    start = nearest(W, grid)
    refit = polish(W, start, grid, c, 0)
    levels = grid.levels.values(start.codes).double()
    Hd = c.H.double()
    best = (levels @ Hd * W.double()).sum(1) / torch.linalg.vecdot(levels @ Hd, levels)
    torch.testing.assert_close(refit.params["scale"][:, 0].double(), best, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["q4_0", "q4_k"])
def test_rows_do_not_influence_each_other(name: str) -> None:
    W, H = layer(6)
    c = curvature(H)
    whole, *parts = (
        rounded("feedback", part, GRIDS[name], c, Effort())[0].quantized.dequantize() for part in (W, *W.split(5))
    )
    parts = torch.cat(parts)
    torch.testing.assert_close(whole, parts, rtol=0, atol=2e-2)
    assert (whole == parts).float().mean() > 0.95  # sums of different shapes may differ in their last bit


def test_a_power_of_two_scales_through() -> None:
    W, H = layer(7)
    c = curvature(H)
    one, four = (rounded("feedback", factor * W, GRIDS["q4_k"], c, Effort())[0].quantized for factor in (1.0, 4.0))
    assert torch.equal(4 * one.dequantize(), four.dequantize())


def test_the_better_of_two_is_chosen_row_by_row() -> None:
    W, H = layer(8, rows=2)
    c = curvature(H)
    good, bad = search(W, GRIDS["q8_0"]), nearest(W * 2, GRIDS["q8_0"])
    mixed = better_rows(scored(W, bad, c.H), scored(W, good, c.H)).quantized
    assert torch.equal(mixed.dequantize(), good.dequantize())
