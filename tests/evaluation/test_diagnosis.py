"""Faults with a form, on random matrices: each is told apart, and honest errors of many sizes are none."""

import pytest
import torch
from torch import Tensor

from whit.evaluation.diagnosis import matrix_damage, vector_damage
from whit.grids.named import grid_named
from whit.rounding.nearest import nearest

W = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(128, 256, generator=torch.Generator().manual_seed(1))


def rounded(rows: Tensor, grid: str = "q4_0") -> Tensor:
    return nearest(rows, grid_named(grid)).dequantize()


def fault(Q: Tensor) -> str:
    return matrix_damage(Q, W, rounded, {"other": lambda: OTHER}).fault


def test_plain_rounding_is_its_own_unit() -> None:
    found = matrix_damage(rounded(W), W, rounded, {})
    assert found.ratio == pytest.approx(1, abs=0.02)
    assert found.fault == ""


@pytest.mark.parametrize("times", [1.0, 2.0, 3.0])
def test_errors_without_form_are_none(times: float) -> None:
    noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(2))
    error = (rounded(W) - W).norm() / W.norm()
    assert fault(W + times * error * noise) == ""


@pytest.mark.parametrize("grid", ["q8_0", "q6_k", "q4_k", "q3_k", "q2_k", "iq2_xxs", "tq2_0", "int2-asym", "nf4-g64"])
def test_no_grid_is_a_fault_by_itself(grid: str) -> None:
    for each in (W, W * torch.linspace(0.2, 5, 256), torch.cat([W[:64], W[64:] ** 3])):
        Q = rounded(each, grid)
        assert matrix_damage(Q, each, lambda rows: rounded(rows, grid), {}).fault == ""


def test_another_tensor_is_named() -> None:
    assert fault(rounded(OTHER)) == "it holds the values of other"
    assert fault(rounded(OTHER.flip(0))) == "its values are not this model's"
    assert fault(torch.zeros_like(W)) == "it is zero everywhere"


def test_orders_are_named() -> None:
    nibbles = rounded(W).view(128, 8, 2, 16).flip(2).reshape(W.shape)
    assert (
        fault(nibbles)
        == "its columns are in another order: halves of every 32 are swapped, as by the wrong nibble first"
    )
    assert "neighbours are swapped" in fault(rounded(W).view(128, 128, 2).flip(2).reshape(W.shape))
    rotary = rounded(W).view(2, 2, 32, 256).transpose(1, 2).reshape(W.shape)
    assert fault(rotary).endswith("rotary halves and pairs are mixed up (heads of 64)")
    assert fault(rounded(W).roll(1, 0)) == "its rows are in another order"


def test_a_constant_and_a_factor_are_named() -> None:
    assert "a constant is added to every group" in fault(rounded(W) + 0.3)
    assert fault(rounded(W) * 2) == "its values are 2 times the original's"


def test_places_are_named() -> None:
    Q = rounded(W)
    Q[7, 64:96] = 0
    assert fault(Q).startswith("about 32 weights are zero, but should not be (row 7 from column 64)")
    Q = rounded(W)
    Q[9, 32:64] *= 50
    assert fault(Q).startswith("about 32 weights are far off, but should not be (row 9 from column 32)")
    Q = rounded(W)
    Q[0, 0] = float("nan")
    assert fault(Q) == "1 of 32,768 values are not finite"


def test_vectors_are_exact_or_nearly() -> None:
    w, other = 1 + W[0] / 5, 1 + W[1] / 5
    assert vector_damage(w * 1.05, w, {}).fault == ""
    assert vector_damage(other, w, {"other": lambda: other}).fault == "it holds the values of other"
    assert "should be exact" in vector_damage(other, w, {}).fault
