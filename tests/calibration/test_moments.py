import pytest
import torch

from whit.calibration.moments import ENOUGH, Moments, pooled, target_shift
from whit.errors import BadWeightsError


def batches(n: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, 24, generator=generator) for _ in range(n)]


def test_the_order_of_batches_does_not_matter() -> None:
    one, other = Moments(24), Moments(24)
    for batch in batches():
        one.add(batch)
        one.settle()
    for batch in reversed(batches()):
        other.add(batch)
        other.settle()
    assert torch.equal(one.H, other.H)


def test_it_is_the_mean_of_outer_products() -> None:
    moments = Moments(24)
    for batch in batches():
        moments.add(batch)
    X = torch.cat(batches()).double()
    torch.testing.assert_close(moments.H, X.T @ X / len(X), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.importance.double(), X.square().mean(0), rtol=1e-6, atol=0)


def test_tokens_that_are_not_finite_are_dropped_and_counted_and_too_many_are_refused() -> None:
    moments, clean = Moments(24), Moments(24)
    batch = torch.cat(batches())
    clean.add(batch)
    moments.add(torch.cat([batch, torch.full((1, 24), torch.inf)]))
    assert (moments.n_tokens, moments.n_lost) == (240, 1)
    torch.testing.assert_close(moments.H, clean.H, rtol=1e-6, atol=1e-6)
    with pytest.raises(BadWeightsError, match="blk.0: 1 of 241 calibration tokens"):
        moments.check("blk.0")


def test_inputs_that_are_always_zero_are_counted() -> None:
    moments = Moments(3)
    moments.add(torch.tensor([[1.0, 0.0, 2.0]]))
    assert moments.n_dead == 1


def test_the_shifted_target_completes_the_square() -> None:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(300, 16, generator=generator).double()
    Xo = X + 0.3 * torch.randn(300, 16, generator=generator).double()
    moments = Moments(16, shifted=True)
    moments.add(X.float(), Xo.float())
    assert moments.C is not None
    W = torch.randn(4, 16, generator=generator).double()
    target = W + W @ target_shift(moments.H, moments.C, 0.01).double()
    damped = moments.H + 0.01 * moments.H.diagonal().mean() * torch.eye(16)
    lam = 0.01 * moments.H.diagonal().mean()
    differences = []
    for _ in range(5):
        Q = torch.randn(4, 16, generator=generator).double()
        wanted = ((X @ Q.T - Xo @ W.T).square().sum() / 300) + lam * (Q - W).square().sum()
        quadratic = torch.linalg.vecdot((Q - target) @ damped, Q - target).sum()
        differences.append(wanted - quadratic)
    torch.testing.assert_close(torch.stack(differences), differences[0].expand(5), rtol=1e-4, atol=1e-4)


def test_without_a_difference_there_is_no_shift() -> None:
    moments = Moments(24, shifted=True)
    for batch in batches():
        moments.add(batch, batch)
    assert moments.C is not None
    assert torch.equal(target_shift(moments.H, moments.C, 0.01), torch.zeros(24, 24))


def test_experts_with_enough_tokens_keep_their_moments_and_thin_ones_are_shrunk_to_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    rich, thin, empty = Moments(8), Moments(8), Moments(8)
    rich.add(torch.randn(ENOUGH * 8, 8, generator=generator))
    thin.add(3 * torch.randn(4, 8, generator=generator))
    first, second, third, fourth = pooled([rich, thin, empty, None])
    assert first is rich
    mean = (rich.H * rich.n_tokens + thin.H * thin.n_tokens) / (rich.n_tokens + thin.n_tokens)
    assert second is not None
    assert third is not None
    assert fourth is not None
    torch.testing.assert_close(second.H, (4 * thin.H + 8 * mean) / 12)
    torch.testing.assert_close(third.H, mean)
    torch.testing.assert_close(fourth.H, mean)
    assert "backed by" in second.note
    assert "no calibration token" in third.note
    assert (second.n_tokens, third.n_tokens) == (4, 0)


def test_experts_that_no_token_reached_at_all_stay_unknown() -> None:
    assert pooled([None, None]) == [None, None]


def test_an_importance_matrix_gives_a_diagonal() -> None:
    moments = Moments.of_importance(torch.tensor([1.0, 4.0, 0.0]), 100)
    assert torch.equal(moments.H, torch.tensor([1.0, 4.0, 0.0]).diag().double())
    assert (moments.n_tokens, moments.n_dead) == (100, 1)


def test_saved_moments_are_the_same_to_seven_digits() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    x[3, 2] = float("nan")
    moments = Moments(6, kept=4)
    moments.add(x)
    counts, tensors = moments.saved()
    again = Moments.of_saved(counts, tensors)
    assert (again.n_tokens, again.n_lost) == (39, 1)
    assert torch.allclose(again.H, moments.H, rtol=1e-6)
    assert again.tokens is not None
    assert torch.equal(again.tokens, moments.tokens)
