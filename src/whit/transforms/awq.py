"""Factors for the columns of a matrix that make it easier to round: AWQ, judged by second moments.

    t = s^a / m^b        s root mean square of the inputs, m root mean square of the weights of a column

A large s asks for precision, a large m takes it from the neighbours in the group. AWQ chooses a in 0..1 with b = 1 - a
by running the block for every candidate. Here the loss of rounding is known in closed form: under t the moments become
diag(1/t) H diag(1/t), so that candidates are compared on a sample of rows without any forward pass, first by their
errors weighted with the conditional curvature, and the best one then by the loss after error feedback.
Source: arXiv 2306.00978 (AWQ), equations 4 and 5; the rest in docs/rounding.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.grid import Adaptive
from whit.rounding.curvature import Curvature
from whit.rounding.feedback import feedback
from whit.rounding.nearest import search
from whit.rounding.polish import loss

EXPONENTS = ((0.0, 1.0), (0.1, 0.9), (0.15, 0.85), (0.25, 0.75))  # a, b; the optimum is flat (docs/rounding.md)
ROWS = 64  # sampled from every consumer
WORTH = 0.98  # a loss above this share of the loss without is not worth a change
RANGE = 1e3  # factors stay within 1/RANGE..RANGE of their geometric mean


@dataclass(frozen=True)
class Sample:
    """Some rows of consumers that share an input and a grid.

    W       [n, cols] float32
    grid    what they will be rounded to
    weight  [n] float32, rows of the consumer that a sampled row stands for
    """

    W: Tensor
    grid: Adaptive
    weight: Tensor


def sampled(consumers: Iterable[tuple[Tensor, Adaptive]]) -> list[Sample]:
    """ROWS evenly spaced rows of every matrix [rows, cols], put together by grid."""
    found: dict[Adaptive, tuple[list[Tensor], list[Tensor]]] = {}
    for W, grid in consumers:
        n = min(ROWS, W.shape[0])
        parts, weights = found.setdefault(grid, ([], []))
        parts.append(W[torch.linspace(0, W.shape[0] - 1, n).round().long()])
        weights.append(torch.full((n,), W.shape[0] / n))
    return [Sample(torch.cat(parts), grid, torch.cat(weights)) for grid, (parts, weights) in found.items()]


def column_factors(samples: Sequence[Sample], c: Curvature, channel: Tensor) -> Tensor | None:
    """Factors t [channels] float32 for the columns of consumers that share an input, None when none is worth it.

    c        of the shared input
    channel  [cols] int64, the channel of every column; columns of one channel have one factor
    """
    n_channels = int(channel.max()) + 1
    total = torch.zeros(n_channels)
    mass = torch.cat([each.W * each.weight[:, None].sqrt() for each in samples]).square().mean(0)
    inputs = total.index_add(0, channel, c.H.diagonal())
    weights = total.index_add(0, channel, mass)
    candidates = [_factors(inputs, weights, a, b) for a, b in EXPONENTS]
    errors = [_screened(samples, c.rescaled(t[channel]), t[channel]) for t in candidates]
    best = candidates[errors.index(min(errors))]
    after, before = (_loss(samples, c.rescaled(t), t) for t in (best[channel], torch.ones(len(channel))))
    return best if after < WORTH * before else None


def _factors(inputs: Tensor, weights: Tensor, a: float, b: float) -> Tensor:
    """Geometric mean one; channels that never fire or have no weights get the factor that the others' mean asks for."""
    logs = torch.zeros(inputs.shape)
    for value, power in ((inputs, a / 2), (weights, -b / 2)):
        alive = value > 0
        own = torch.where(alive, value, 1.0).log()
        logs += power * torch.where(alive, own, own[alive].mean() if alive.any() else 0.0)
    logs -= logs.mean()
    limit = torch.tensor(RANGE).log()
    return logs.clamp(-limit, limit).exp()


def _screened(samples: Sequence[Sample], c: Curvature, t: Tensor) -> float:
    """Errors of weighted rounding without feedback: cheap, and in nearly the same order as the loss."""
    weights = c.R.diagonal().square()
    total = 0.0
    for each in samples:
        W = each.W * t
        total += (each.weight @ (search(W, each.grid, weights).dequantize() - W).square() @ weights).item()
    return total


def _loss(samples: Sequence[Sample], c: Curvature, t: Tensor) -> float:
    """The loss after error feedback."""
    total = 0.0
    for each in samples:
        W = each.W * t
        total += (each.weight @ loss(W, feedback(W, each.grid, c, late=False).dequantize(), c.H).float()).item()
    return total
