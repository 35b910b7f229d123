"""What moves in one matrix: nothing at first, and gradients that finite differences agree with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whit.grids.grid import Grid
from whit.grids.named import GRIDS, grid_named
from whit.grids.quantized import QuantizedTensor
from whit.live.learner import INSIDE, Learner, step_of
from whit.rounding.nearest import nearest

NAMES = ("int4-g32", "int4-g32-asym", "int3-g64", "int2-g32-asym", "int8:f32", "nf4-g64", "fp8", "mxfp4", "nvfp4")
TABLES = ("kmeans3", "kmeans2-g32", "kmeans4-tensor", "kmeans3+2%", "kmeans2-g32+1%")
GGML = ("q4_0", "q4_1", "q5_0", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "iq3_s", "iq2_xs")


def grid_of(name: str) -> Grid:
    return GRIDS[name] if name in GRIDS else grid_named(name)


def start_of(name: str, seed: int = 0):  # type: ignore[no-untyped-def]
    W = torch.randn(6, 256, generator=torch.Generator().manual_seed(seed))
    return W, nearest(W, grid_of(name))


@pytest.mark.parametrize("name", [*NAMES, *GGML, *TABLES])
@pytest.mark.parametrize("kind", ["full", "scales", "lora"])
def test_nothing_changes_at_first(name: str, kind: str) -> None:
    W, start = start_of(name)
    for original in (None, W):
        learner = Learner(start, kind != "scales", True, original, 3 if kind == "lora" else None)
        assert torch.equal(learner.quantized().dequantize(), start.dequantize())


@pytest.mark.parametrize("name", [*NAMES, *GGML, *TABLES])
def test_offsets_of_a_few_steps_move_codes_and_the_matrix_is_what_a_file_holds(name: str) -> None:
    W, start = start_of(name)
    learner = Learner(start, True, True)
    assert learner.offset is not None
    learner.offset.data += 3 * torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    for change in learner.changes.values():
        change.data += 0.05
    found = learner.quantized()  # shapes and types are checked when it is made
    assert found.grid == start.grid
    assert not torch.equal(found.codes, start.codes)
    assert torch.equal(learner(), found.dequantize())


@pytest.mark.parametrize("name", [*(name for name in (*NAMES, *GGML) if hasattr(grid_of(name), "bases")), *TABLES])
def test_gradients_of_scales_levels_and_outliers_are_those_of_finite_differences(name: str) -> None:
    _, start = start_of(name)
    learner = Learner(start, True, True)
    G = torch.randn(start.shape, generator=torch.Generator().manual_seed(2))
    (learner() * G).sum().backward()
    step, checked = 0.2, 0  # wide: scales are rounded to half precision, and the matrix is linear in them
    for change in learner.changes.values():
        assert change.grad is not None
        direction = change.grad.sign()
        ends = []
        for sign in (1, -1):
            change.data.copy_(sign * step * direction)
            ends.append((learner().double() * G).sum().item())
        change.data.zero_()
        told = (change.grad * direction).sum().item()
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(told, rel=0.02, abs=1e-3)
        checked += 1
    assert checked or not learner.changes


@pytest.mark.parametrize("name", TABLES)
def test_levels_and_outliers_learn_and_codes_columns_and_the_order_of_levels_stay(name: str) -> None:
    W, start = start_of(name)
    learner = Learner(start, False, True)
    target = start.dequantize() + 0.1 * W.abs() * start.dequantize().sign()
    before = (learner() - target).square().sum()
    for _ in range(50):
        (learner() - target).square().sum().backward()
        for value in learner.moving():
            value.data -= 0.01 * value.grad.sign()  # type: ignore[union-attr]
            value.grad = None
    found = learner.quantized()
    assert (found.dequantize() - target).square().sum() < before
    moved = {key for key, value in start.params.items() if not torch.equal(value, found.params[key])}
    assert moved == set(start.params) - {"columns"}
    assert torch.equal(found.codes, start.codes)
    for change in learner.changes.values():  # far beyond each other
        change.data.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    tables = learner.quantized().params["levels"].view(-1, 2 ** int(name[6]))
    assert (tables[:, 1:] >= tables[:, :-1]).all()


def test_steps_are_those_of_levels_whatever_lies_beside_and_however_many_tables_there_are() -> None:
    levels = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0, 2.0, 4.0, 6.0]]).half()
    params = {
        "levels": levels,
        "columns": torch.tensor([[5]], dtype=torch.int16),
        "values": torch.tensor([[50.0]]).half(),
    }
    codes = torch.arange(32).remainder(4).to(torch.uint8)[None]
    start = QuantizedTensor(grid_of("kmeans2-g16+3%"), (1, 32), codes, params)
    assert torch.equal(step_of(start), torch.tensor([[1.0, 2.0]]))


def test_gradients_of_offsets_go_straight_through() -> None:
    _, start = start_of("int4-g32")
    learner = Learner(start, True, False)
    G = torch.randn(start.shape)
    (learner() * G).sum().backward()
    assert learner.offset is not None
    assert learner.offset.grad is not None
    expected = (G.view(6, 8, 32) * step_of(start)[..., None]).view(6, 256)
    assert torch.equal(learner.offset.grad, expected)
    assert not learner.changes


def test_gradients_of_low_rank_are_those_of_the_product() -> None:
    _, start = start_of("int4-g32")
    learner = Learner(start, True, False, rank=3)
    assert learner.A is not None
    assert learner.B is not None
    learner.B.data.normal_(generator=torch.Generator().manual_seed(1))
    G = torch.randn(start.shape)
    (learner() * G).sum().backward()
    A, B = (each.detach().clone().requires_grad_() for each in (learner.A, learner.B))
    steps = step_of(start)[..., None]
    ((B @ A).view(6, 8, 32) * steps * G.view(6, 8, 32)).sum().backward()
    assert torch.allclose(learner.A.grad, A.grad, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(learner.B.grad, B.grad, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@given(st.sampled_from(NAMES), st.integers(0, 5))
def test_weights_start_where_they_were_within_the_reach_of_their_level(name: str, seed: int) -> None:
    W, start = start_of(name, seed)
    learner = Learner(start, True, True, W)
    assert learner.offset is not None
    assert learner.offset.abs().max() <= INSIDE
    spread = learner.step.repeat_interleave(256 // learner.step.shape[1], 1)
    near = ((W - start.dequantize()).abs() < INSIDE * spread) & (learner.offset != 0)
    assert near.float().mean() > 0.4
    back = start.dequantize() + learner.offset * spread
    assert torch.allclose(back[near], W[near], atol=1e-4)


def test_a_group_of_zeros_stays() -> None:
    start = nearest(torch.zeros(2, 64), grid_of("int4-g32"))
    learner = Learner(start, True, True, torch.zeros(2, 64))
    (learner() * torch.randn(2, 64)).sum().backward()
    assert learner.offset is not None
    assert learner.offset.grad is not None
    assert torch.equal(learner.offset.grad, torch.zeros(2, 64))
    assert torch.equal(learner.quantized().dequantize(), torch.zeros(2, 64))
