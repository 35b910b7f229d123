from dataclasses import replace

import pytest
import torch

from whit.evaluation.divergence import Comparison, measure, summarize
from whit.evaluation.verdict import BROKEN, DAMAGED, EXCELLENT, GOOD, USABLE, verdict


def compared(kl_mean: float, error: float = 0.0) -> Comparison:
    logits = torch.zeros(2, 3)
    return replace(summarize(measure(logits, logits, torch.tensor([0, 1]))), kl_mean=kl_mean, kl_mean_se=error)


@pytest.mark.parametrize(
    ("kl", "word"), [(0.0, EXCELLENT), (0.01, EXCELLENT), (0.05, GOOD), (0.3, USABLE), (1.0, DAMAGED), (3.0, BROKEN)]
)
def test_the_word_follows_the_divergence(kl: float, word: str) -> None:
    found = verdict(compared(kl), ())
    assert (found.word, found.near) == (word, "")
    assert found.passed == (word in (EXCELLENT, GOOD, USABLE))


def test_an_error_that_reaches_the_next_word_is_said() -> None:
    assert verdict(compared(0.09, 0.01), ()).near == USABLE
    assert verdict(compared(0.11, 0.01), ()).near == GOOD
    assert verdict(compared(0.09, 0.004), ()).near == ""


def test_a_fault_damages_and_never_improves() -> None:
    assert verdict(compared(0.001), ("a scale is zero",)).word == DAMAGED
    assert verdict(compared(5.0), ("a scale is zero",)).word == BROKEN
    assert "a scale is zero" in verdict(compared(5.0), ("a scale is zero",)).why


def test_what_cannot_be_run_is_broken() -> None:
    assert verdict(None, (), "truncated").word == BROKEN
    assert verdict(compared(float("inf")), ()).word == BROKEN
