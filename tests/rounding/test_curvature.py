import pytest
import torch

from whit.rounding.curvature import curvature


def moments(seed: int, cols: int = 48, tokens: int = 200) -> torch.Tensor:
    X = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed)).double()
    return X.T @ X / tokens


def test_the_factor_is_upper_triangular_and_gives_back_the_damped_matrix() -> None:
    H = moments(0)
    c = curvature(H, damping=0.01)
    assert torch.equal(c.R, c.R.triu())
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(48)
    torch.testing.assert_close((c.R @ c.R.T).double(), damped, rtol=1e-5, atol=1e-6)
    assert c.note == ""


def test_fewer_tokens_than_inputs_are_no_obstacle() -> None:
    c = curvature(moments(1, tokens=3))
    assert torch.isfinite(c.R).all()


def test_an_indefinite_matrix_is_helped_and_the_note_says_so() -> None:
    H = moments(2)
    H -= 3 * torch.eye(48)
    c = curvature(H)
    assert torch.isfinite(c.R).all()
    assert c.note


def test_inputs_that_never_came_count_all_the_same() -> None:
    c = curvature(torch.zeros(8, 8))
    assert torch.equal(c.H, torch.eye(8))
    assert "no input" in c.note


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        curvature(torch.full((4, 4), torch.nan))
