"""Factors for the columns of a matrix whose inputs are quantized too: SmoothQuant, with its exponent chosen.

    t = max|x|^a / max|w|^(1 - a)     per channel, over tokens and rows; columns are multiplied, inputs divided by t

A large a moves what sticks out of the inputs into the weights, where a row can hold it. Which a: both roundings are
uniform, so that their expected squared errors at the output can be added up on a sample of tokens and rows,

    weights    sum over rows of (max_j |w_j t_j| / 127)^2 / 12 * sum_j E[x_j^2] / t_j^2
    inputs     mean over tokens of (max_j |x_j| / t_j / 127.5)^2 / 12 * sum of (w_j t_j)^2

and the least of a few a, or no factors at all, is taken.
Source: arXiv 2211.10438 (SmoothQuant), equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whit.transforms.awq import RANGE, Sample

EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WEIGHT_CODES, INPUT_CODES = 127.0, 127.5


def smooth_factors(samples: Sequence[Sample], tokens: Tensor, squares: Tensor, channel: Tensor) -> Tensor | None:
    """Factors t [channels] float32 for the columns of consumers that share an input, None when none are better.

    samples  some rows of the consumers, with what each stands for
    tokens   [n, cols] float32, some of the inputs
    squares  [cols] mean squared inputs over all tokens
    channel  [cols] int64, the channel of every column; columns of one channel have one factor
    """
    W = torch.cat([each.W for each in samples])
    rows = torch.cat([each.weight for each in samples])
    n = int(channel.max()) + 1
    inputs = torch.zeros(n).scatter_reduce(0, channel, tokens.abs().amax(0), "amax")
    weights = torch.zeros(n).scatter_reduce(0, channel, W.abs().amax(0), "amax")
    best, least = None, expected_error(W, rows, tokens, squares, torch.ones_like(squares))
    for exponent in EXPONENTS:
        t = _factors(inputs, weights, exponent)
        error = expected_error(W, rows, tokens, squares, t[channel])
        if error < least:
            best, least = t, error
    return best


def expected_error(W: Tensor, rows: Tensor, tokens: Tensor, squares: Tensor, t: Tensor) -> float:
    """Mean squared error at the output of both roundings, columns multiplied with t [cols].

    W [n, cols], rows [n] how many rows each stands for, tokens [tokens, cols], squares [cols]
    """
    moved = W * t
    of_weights = (moved.abs().amax(1) / WEIGHT_CODES).square() @ rows * (squares / t.square()).sum()
    of_inputs = ((tokens / t).abs().amax(1) / INPUT_CODES).square().mean() * (moved.square().sum(1) @ rows)
    return ((of_weights + of_inputs) / 12).item()


def _factors(inputs: Tensor, weights: Tensor, exponent: float) -> Tensor:
    """Geometric mean one; channels that never fire or have no weights get one."""
    alive = (inputs > 0) & (weights > 0)
    logs = torch.where(
        alive, exponent * inputs.clamp(min=1e-30).log() - (1 - exponent) * weights.clamp(min=1e-30).log(), 0
    )
    logs = torch.where(alive, logs - logs[alive].mean() if alive.any() else logs, 0)
    limit = torch.tensor(RANGE).log()
    return logs.clamp(-limit, limit).exp()
