"""Truth: closed forms, scipy-free definitions in exact fractions, torch's own kl_div."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from whit.evaluation.divergence import TokenMeasures, joined, mean_and_error, measure, summarize


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_divergence_of_two_coins_is_the_closed_form() -> None:
    reference, candidate = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    found = measure(candidate, reference, torch.tensor([0]))
    assert found.kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)


def test_divergence_is_weighted_by_the_reference_not_by_the_candidate() -> None:
    certain, coin = torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2)
    assert measure(coin, certain, torch.tensor([0])).kl.item() == pytest.approx(math.log(2))
    assert measure(certain, coin, torch.tensor([0])).kl.item() == math.inf


def test_divergence_and_likelihoods_equal_those_of_torch() -> None:
    candidate, reference, targets = draw(40, 300), draw(40, 300, seed=1), torch.arange(40)
    found = measure(candidate, reference, targets)
    q, p = candidate.double().log_softmax(1), reference.double().log_softmax(1)
    torch.testing.assert_close(found.kl, kl_div(q, p, reduction="none", log_target=True).sum(1))
    torch.testing.assert_close(found.nll, cross_entropy(candidate.double(), targets, reduction="none"))
    torch.testing.assert_close(found.nll_reference, cross_entropy(reference.double(), targets, reduction="none"))


def test_equal_models_diverge_by_exactly_nothing() -> None:
    logits = draw(10, 1000) * 10
    found = measure(logits, logits.clone(), torch.zeros(10, dtype=torch.int64))
    assert found.kl.eq(0).all()
    assert found.same_top.all()


def test_a_constant_added_to_all_logits_changes_nothing_but_the_last_bits() -> None:
    logits, targets = draw(10, 1000), torch.zeros(10, dtype=torch.int64)
    found = measure(logits + 8, logits, targets)
    assert found.kl.max() < 1e-12  # float32 sums would be off by 1e-7


def test_divergence_of_a_tiny_change_is_half_its_variance() -> None:
    logits, change = draw(4, 5000, seed=2), draw(4, 5000, seed=3) * 1e-3
    found = measure((logits.double() + change).float(), logits, torch.zeros(4, dtype=torch.int64))
    p = logits.double().softmax(1)
    variance = (p * change.double() ** 2).sum(1) - (p * change).sum(1) ** 2
    torch.testing.assert_close(found.kl, variance / 2, rtol=1e-2, atol=0)


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 1000))
def test_divergence_is_never_negative(tokens: int, vocab: int, seed: int) -> None:
    reference = draw(tokens, vocab, seed=seed)
    candidate = reference + 1e-6 * draw(tokens, vocab, seed=seed + 1)
    assert (measure(candidate, reference, torch.zeros(tokens, dtype=torch.int64)).kl >= 0).all()


def test_same_top_counts_positions_where_both_prefer_the_same_token() -> None:
    candidate = torch.tensor([[0.0, 1, 2], [5, 1, 2], [0, 9, 2], [1, 0, 0]])
    reference = torch.tensor([[0.0, 0, 1], [0, 1, 2], [0, 1, 0], [9, 0, 0]])
    found = summarize(measure(candidate, reference, torch.zeros(4, dtype=torch.int64)))
    assert found.same_top == 0.75
    assert found.same_top_se == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # binomial, over n - 1


def test_a_model_without_knowledge_has_the_perplexity_of_its_vocabulary() -> None:
    even = torch.zeros(7, 250)
    found = summarize(measure(even, even, torch.arange(7)))
    assert found.perplexity == pytest.approx(250)
    assert found.perplexity_reference == pytest.approx(250)
    assert found.perplexity_se == pytest.approx(0, abs=1e-9)
    assert found.perplexity_ratio == 1


def test_error_of_a_perplexity_is_that_of_the_mean_log_likelihood_times_the_perplexity() -> None:
    nll = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    found = summarize(TokenMeasures(zero, nll, zero, zero.bool()))
    # By hand: the mean is 7/3; llama.cpp's error is sqrt((mean of squares - mean^2) / (n - 1)).
    error = math.sqrt((21 / 3 - (7 / 3) ** 2) / 2)
    assert found.perplexity == pytest.approx(math.exp(7 / 3))
    assert found.perplexity_se == pytest.approx(math.exp(7 / 3) * error)


def test_error_of_the_ratio_is_that_of_the_paired_difference() -> None:
    nll_reference = draw(50).double().abs() * 5
    found = summarize(TokenMeasures(nll_reference, nll_reference + 0.25, nll_reference, nll_reference > 1))
    assert found.log_ratio == pytest.approx(0.25)
    assert found.log_ratio_se == pytest.approx(0, abs=1e-9)  # although both perplexities are uncertain
    assert found.perplexity_se > 1
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.perplexity_reference)


def test_quantiles_are_interpolated_between_sorted_tokens() -> None:
    kl = torch.arange(1001, dtype=torch.float64)[torch.randperm(1001, generator=torch.Generator().manual_seed(0))]
    found = summarize(TokenMeasures(kl, kl, kl, kl > 0))
    assert (found.kl_median, found.kl_p99, found.kl_p999, found.kl_max) == pytest.approx((500, 990, 999, 1000))
    assert found.tokens == 1001


def test_a_single_token_has_no_error() -> None:
    assert mean_and_error(torch.tensor([3.0], dtype=torch.float64)) == (3.0, 0.0)


def test_pieces_of_a_text_join_to_the_whole() -> None:
    candidate, reference, targets = draw(9, 20), draw(9, 20, seed=1), torch.arange(9)
    parts = [measure(candidate[s], reference[s], targets[s]) for s in (slice(0, 4), slice(4, 9))]
    assert summarize(joined(parts)) == summarize(measure(candidate, reference, targets))


def test_a_hopeless_perplexity_is_infinite_and_not_a_crash() -> None:
    nll = torch.full((2,), 5000.0, dtype=torch.float64)
    assert summarize(TokenMeasures(nll, nll, nll, nll > 0)).perplexity == math.inf


def test_logits_of_different_vocabularies_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="tokens, vocab"):
        measure(torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64))
