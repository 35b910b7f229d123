"""`kl`: ranges cut so that the distribution of the rounded weights is nearest to that of the weights.

    P      histogram of a group's weights over their whole range
    Q      what is left of it: the share of each level, spread evenly over the part of the range that rounds to it
    cut    the one of a few whose KL(P || Q) is least; beyond it Q is next to nothing

A level stands for a piece of density, so that KL(P || Q) is, but for a constant, the mean of -log Q at the weights: the
cut is the most likely piecewise constant density. This looks at no input of the layer and at no gradient; what it
optimises is not what a model loses (docs/quantizers.md compares). For that see `fisher` in methods.py.
Source: the entropy method of TensorRT's int8 calibration (S. Migacz, GTC 2017), for weights and with full cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.grids.floats import Float
from whit.grids.grid import Grid, Params
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import PerTensor, Scaled
from whit.rounding.nearest import by_rows, nearest

CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2)  # of the largest magnitude
BINS = 1024  # at most; four per weight in small groups
SMOOTH = 1e-4  # weight of an even distribution in Q, so that no logarithm is of zero


def kl(W: Tensor, grid: Grid, importance: Tensor | None = None) -> QuantizedTensor:
    """Nearest level under ranges that are cut to the least divergence of the weights' distribution.

    W  [rows, cols] float32, bfloat16 or float16; `importance` plays no part
    Raises ValueError for grids without one level of scales.
    """
    if isinstance(grid, Float):
        return nearest(W, grid)
    if not isinstance(grid, Scaled):
        raise ValueError(f"`kl` cuts the range of scales, and {grid} has none of one level")

    def rounded(part: Tensor) -> QuantizedTensor:
        params, (rows, cols) = cut(part, grid), part.shape
        return QuantizedTensor(grid, (rows, cols), grid.round(part, params), params)

    return by_rows(W, grid, rounded)


def cut(W: Tensor, grid: Scaled) -> Params:
    """Stored parameters of the cut, of CUTS, whose divergence is least in every group of W [rows, cols]."""
    best: dict[str, Tensor] = {}
    x = _blocks(W, grid)  # [n_rows, n_groups, size]
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    n = min(BINS, 4 * x.shape[-1])
    place = ((x - low) * (n / (high - low).clamp(min=1e-30))).long().clamp_(0, n - 1)
    P = torch.zeros(*x.shape[:-1], n).scatter_add_(-1, place, torch.full_like(x, 1 / x.shape[-1]))
    centres = low + (torch.arange(n) + 0.5) / n * (high - low)
    largest = torch.maximum(high, -low)
    least = torch.full(x.shape[:-1], torch.inf)
    for share in CUTS:
        lower, upper = torch.maximum(low, -share * largest), torch.minimum(high, share * largest)
        params = grid.store(grid.fit(torch.clamp(x, lower, upper).reshape(W.shape)))
        codes = grid.round_blocks(centres, params).long()
        inside = ((centres >= lower) & (centres <= upper)).float()
        found = divergence(P, codes, inside, 2**grid.levels.bits)
        better = found < least
        least = torch.where(better, found, least)
        best = {name: torch.where(better, value, best.get(name, value)) for name, value in params.items()}
    return best


def divergence(P: Tensor, codes: Tensor, inside: Tensor, n_levels: int) -> Tensor:
    """KL(P || Q) in nats [...], Q the share of every level spread over its bins.

    P       [..., bins], sums to 1
    codes   [..., bins] int64, the level that each bin rounds to
    inside  [..., bins], 1 for bins that hold some of their level's share, 0 beyond the cut
    """
    shares = torch.zeros(*P.shape[:-1], n_levels).scatter_add_(-1, codes, P)
    bins = torch.zeros_like(shares).scatter_add_(-1, codes, inside)
    Q = (shares / bins.clamp(min=1)).gather(-1, codes) * inside
    Q = (1 - SMOOTH) * Q + SMOOTH / P.shape[-1]
    return (torch.xlogy(P, P) - torch.xlogy(P, Q)).sum(-1)


def _blocks(W: Tensor, grid: Scaled) -> Tensor:
    rows, cols = W.shape
    if isinstance(grid.scheme, PerTensor):
        return W.reshape(1, 1, -1)
    grid.schema((rows, cols))  # divisibility
    return W.reshape(rows, -1, grid.spans(cols)[0])
