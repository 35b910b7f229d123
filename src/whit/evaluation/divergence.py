"""How far one model's predictions are from another's: divergence, perplexity, agreement.

The arithmetic alone, on logits of the same tokens from two models. Perplexity by itself hides damage that cancels
(some tokens become likelier, others less); the Kullback-Leibler divergence from the reference does not, so it leads.
All sums are float64: the divergence of a good 8-bit model is smaller than the rounding of float32 log-probabilities.

Left out: running models (compare.py), and scores of tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMeasures:
    """What is kept of every scored token.

    kl             [tokens] float64   KL(reference || candidate) over the whole vocabulary, in nats
    nll            [tokens] float64   -log p(token that follows) under the candidate, in nats
    nll_reference  [tokens] float64   the same under the reference
    same_top       [tokens] bool      both give the highest probability to the same token
    """

    kl: Tensor
    nll: Tensor
    nll_reference: Tensor
    same_top: Tensor


@dataclass(frozen=True)
class Comparison:
    """A candidate beside a reference on the same tokens. `_se` is the standard error of the value before it.

    kl_*              mean, quantiles and maximum of the divergence per token, in nats
    perplexity*       exp of the mean negative log-likelihood, of both models
    log_ratio         log of candidate's perplexity over reference's, with the error of the paired difference
    perplexity_ratio  exp of it
    same_top          share of tokens (0..1) where both models prefer the same next token
    tokens            how many tokens were scored
    """

    kl_mean: float
    kl_mean_se: float
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    perplexity: float
    perplexity_se: float
    perplexity_reference: float
    perplexity_reference_se: float
    perplexity_ratio: float
    perplexity_ratio_se: float
    log_ratio: float
    log_ratio_se: float
    same_top: float
    same_top_se: float
    tokens: int


def measure(candidate: Tensor, reference: Tensor, targets: Tensor) -> TokenMeasures:
    """Compare the predictions of two models for the same positions.

    candidate, reference  [tokens, vocab] float32   logits
    targets               [tokens] int64            the token that really follows each position
    Raises ValueError when the shapes disagree.
    """
    if candidate.shape != reference.shape or targets.shape != candidate.shape[:1]:
        shapes = [tuple(tensor.shape) for tensor in (candidate, reference, targets)]
        raise ValueError(f"logits [tokens, vocab] twice and targets [tokens] are needed, got {shapes}")
    log_q = candidate.double().log_softmax(1)  # [tokens, vocab]
    log_p = reference.double().log_softmax(1)
    follows = targets[:, None]  # [tokens, 1]
    nll = -log_q.gather(1, follows)[:, 0]  # [tokens]
    nll_reference = -log_p.gather(1, follows)[:, 0]
    # A token that the reference rules out (logit -inf) adds nothing, whatever the candidate says: 0 log 0 = 0.
    terms = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0)
    kl = terms.sum(1).clamp_min(0)  # rounding can take a true zero below zero
    return TokenMeasures(kl, nll, nll_reference, candidate.argmax(1) == reference.argmax(1))


def joined(parts: Sequence[TokenMeasures]) -> TokenMeasures:
    """The measures of pieces of a text, in order, as those of the whole."""
    return TokenMeasures(
        torch.cat([part.kl for part in parts]),
        torch.cat([part.nll for part in parts]),
        torch.cat([part.nll_reference for part in parts]),
        torch.cat([part.same_top for part in parts]),
    )


def summarize(measures: TokenMeasures) -> Comparison:
    """Means, quantiles and standard errors over tokens.

    Errors treat tokens as independent, as llama.cpp's perplexity tool does; neighbours in a text are not quite, so
    the true ones are somewhat larger. The perplexity's error is that of the mean log-likelihood times the perplexity.
    Raises ValueError without tokens.
    """
    if measures.kl.numel() == 0:
        raise ValueError("no tokens were scored")
    kl_mean, kl_mean_se = mean_and_error(measures.kl)
    nll, nll_se = mean_and_error(measures.nll)
    nll_reference, nll_reference_se = mean_and_error(measures.nll_reference)
    log_ratio, log_ratio_se = mean_and_error(measures.nll - measures.nll_reference)
    same_top, same_top_se = mean_and_error(measures.same_top.double())
    median, p99, p999 = measures.kl.quantile(torch.tensor([0.5, 0.99, 0.999], dtype=torch.float64)).tolist()
    return Comparison(
        kl_mean=kl_mean,
        kl_mean_se=kl_mean_se,
        kl_median=median,
        kl_p99=p99,
        kl_p999=p999,
        kl_max=measures.kl.max().item(),
        perplexity=_exp(nll),
        perplexity_se=_exp(nll) * nll_se,
        perplexity_reference=_exp(nll_reference),
        perplexity_reference_se=_exp(nll_reference) * nll_reference_se,
        perplexity_ratio=_exp(log_ratio),
        perplexity_ratio_se=_exp(log_ratio) * log_ratio_se,
        log_ratio=log_ratio,
        log_ratio_se=log_ratio_se,
        same_top=same_top,
        same_top_se=same_top_se,
        tokens=measures.kl.numel(),
    )


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of `values` [n] float64 and its standard error sqrt(variance / (n - 1)); the error of one value is 0."""
    n = values.numel()
    error = math.sqrt(values.var(correction=0).item() / (n - 1)) if n > 1 else 0.0
    return values.mean().item(), error


def _exp(value: float) -> float:
    """exp, infinite where it overflows: a broken model's perplexity is an answer, not a crash."""
    return math.exp(value) if value < 709 else math.inf
