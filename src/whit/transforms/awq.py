"""Factors for the columns of a matrix that make it easier to round: AWQ without a search.

    t = s^0.15 / m^0.85     s root mean square of the inputs, m root mean square of the weights of a column

A large s asks for precision, a large m takes it from the neighbours in the group. AWQ looks for the exponent by running
the block for every candidate. With error feedback the optimum is the same for every layer and so flat that nothing is
left to look for (docs/rounding.md); what is checked, by the loss after feedback on a sample of rows, is whether a layer
gains at all.
Source: arXiv 2306.00978 (AWQ), equations 4 and 5; the exponents are our own measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.grid import Adaptive
from whit.rounding.curvature import Curvature
from whit.rounding.feedback import feedback
from whit.rounding.polish import loss

INPUTS, WEIGHTS = 0.15, 0.85  # exponents
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
    """Factors t [channels] float32 for the columns of consumers that share an input, None when that is not worth it.

    c        of the shared input
    channel  [cols] int64, the channel of every column; columns of one channel have one factor
    """
    n_channels = int(channel.max()) + 1
    total = torch.zeros(n_channels)
    mass = torch.cat([each.W * each.weight[:, None].sqrt() for each in samples]).square().mean(0)
    inputs = total.index_add(0, channel, c.H.diagonal())
    weights = total.index_add(0, channel, mass)
    found = _factors(inputs, weights)
    t = found[channel]
    before = _loss(samples, c, torch.ones(len(channel)), c.H)
    return found if _loss(samples, c.rescaled(t), t, c.H) < WORTH * before else None


def _factors(inputs: Tensor, weights: Tensor) -> Tensor:
    """Geometric mean one; channels that never fire or have no weights get the factor that the others' mean asks for."""
    logs = torch.zeros(inputs.shape)
    for value, power in ((inputs, INPUTS / 2), (weights, -WEIGHTS / 2)):
        alive = value > 0
        own = torch.where(alive, value, 1.0).log()
        logs += power * torch.where(alive, own, own[alive].mean() if alive.any() else 0.0)
    logs -= logs.mean()
    limit = torch.tensor(RANGE).log()
    return logs.clamp(-limit, limit).exp()


def _loss(samples: Sequence[Sample], c: Curvature, t: Tensor, H: Tensor) -> float:
    """The loss under H after error feedback on columns multiplied with t, under their own curvature c."""
    total = 0.0
    for each in samples:
        W = each.W * t
        Q = feedback(W, each.grid, c, late=False).dequantize() / t
        total += (each.weight @ loss(each.W, Q, H).float()).item()
    return total
