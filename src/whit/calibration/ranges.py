"""How wide the values that arrive somewhere are: a histogram that grows, and four ways to cut it.

A fixed scale for activations needs a range. The largest value alone (`minmax`) lets one outlier take the precision of
everything else; a histogram of |x| lets the cut be chosen:

    minmax      nothing is cut
    percentile  a share of all values stays inside
    mse         least mean squared error of the rounded values, those beyond the cut counted at their distance to it
    kl          least divergence between the distribution of what arrives and of what is left of it

Bins are never split: when a larger value comes, neighbours are merged in pairs, so that histograms of the same data
are the same in whatever order and in whatever parts it came.
Source: docs/live.md; the entropy method is the one of TensorRT's int8 calibration (S. Migacz, GTC 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

BINS = 4096
INSIDE = 0.9999  # share of values that `percentile` keeps
CUTS = 128  # that `mse` tries
FINEST = 512.0  # the smallest of them, as a part of the largest value
STEP = 16  # bins between two cuts that `kl` tries
SMOOTH = 1e-4  # weight of a uniform distribution that is mixed to both, so that no logarithm is of zero


class Histogram:
    """|x| in bins of equal width, a power of two.

    counts  [BINS] float64
    width   of a bin; 0 as long as nothing but zeros came
    most    the largest |x|
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.width, self.most, self._zeros = 0.0, 0.0, 0

    @property
    def n(self) -> int:
        """Values that were counted."""
        return int(self.counts.sum()) + self._zeros

    def add(self, x: Tensor) -> None:
        """Count all values of x, any shape and float dtype; what is not finite is left out."""
        x = x.detach().float().abs().flatten()
        x = x[torch.isfinite(x)]
        if not x.numel():
            return
        most = x.max().item()
        if most == 0:
            self._zeros += x.numel()
            return
        self._reach(most)
        self.most = max(self.most, most)
        index = (x / self.width).long().clamp_(max=BINS - 1)
        self.counts += torch.bincount(index, minlength=BINS).double().to(self.counts.device)

    def merge(self, other: Histogram) -> None:
        """Count what another histogram has counted."""
        self._zeros += other._zeros
        if other.most == 0:
            return
        self._reach(other.most)
        self.most = max(self.most, other.most)
        counts = other.counts
        for _ in range(round(math.log2(self.width / other.width))):
            counts = _halved(counts)
        self.counts += counts

    def _reach(self, most: float) -> None:
        """Make bins wide enough."""
        if self.width == 0:
            self.width = 2.0 ** math.ceil(math.log2(most) + 1e-12) / BINS
        while most >= self.width * BINS:
            self.counts, self.width = _halved(self.counts), 2 * self.width

    def all_counts(self) -> Tensor:
        """[bins up to the largest value] float64, zeros in the first."""
        counts = self.counts.clone()
        counts[0] += self._zeros
        return counts[: int(self.most / self.width) + 1] if self.width else counts[:1]


def _halved(counts: Tensor) -> Tensor:
    return torch.cat([counts.view(-1, 2).sum(1), torch.zeros(BINS // 2, dtype=counts.dtype)])


def minmax(histogram: Histogram, bits: int = 8) -> float:
    """The largest value."""
    return histogram.most


def percentile(histogram: Histogram, bits: int = 8, inside: float = INSIDE) -> float:
    """The smallest bin edge with a share `inside` of all values below it."""
    counts = histogram.all_counts().cumsum(0)
    at = int(torch.searchsorted(counts, inside * counts[-1]))
    return min(histogram.most, (at + 1) * histogram.width)


def mse(histogram: Histogram, bits: int = 8) -> float:
    """The cut with the least squared error after rounding to 2^(bits-1) - 1 steps, each bin at its middle."""
    counts = histogram.all_counts()
    if histogram.most == 0:
        return 0.0
    x = (torch.arange(len(counts), dtype=torch.float64) + 0.5) * histogram.width
    cuts = histogram.most * FINEST ** -torch.linspace(0, 1, CUTS, dtype=torch.float64)
    scale = (cuts / (2 ** (bits - 1) - 1))[:, None]
    left = torch.minimum((x / scale).round(), torch.tensor(float(2 ** (bits - 1) - 1))) * scale  # [cuts, bins]
    return cuts[int(((left - x).square() @ counts).argmin())].item()


def kl(histogram: Histogram, bits: int = 8) -> float:
    """The cut with the least KL(P || Q).

    P is the histogram up to the cut with everything beyond it in its last bin. Q is the histogram up to the cut without
    that, merged into 2^(bits-1) levels and spread again over the bins of a level that hold anything. That P has
    the tail and Q has not is what makes a cut cost something.
    """
    counts = histogram.all_counts()
    levels, n = 2 ** (bits - 1), len(counts)
    if n <= levels:
        return histogram.most
    best, least = n, math.inf
    for cut in [*range(levels, n, STEP), n]:
        divergence = _divergence(counts, cut, levels)
        if divergence < least or (divergence == least and cut > best):
            best, least = cut, divergence
    return min(histogram.most, (best + 0.5) * histogram.width)


def _divergence(counts: Tensor, cut: int, levels: int) -> float:
    inside = counts[:cut]
    P = inside.clone()
    P[-1] += counts[cut:].sum()
    level = torch.arange(cut) * levels // cut
    filled = (inside > 0).double()
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    size = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    Q = (mass / size.clamp(min=1))[level] * filled
    if Q.sum() == 0:
        return math.inf
    p, q = (SMOOTH / cut + (1 - SMOOTH) * each / each.sum() for each in (P, Q))
    return (p * (p / q).log()).sum().item()


def coarseness(histogram: Histogram, most: float, bits: int = 8) -> float:
    """Mean squared error of rounding to 2^(bits-1) - 1 steps up to `most`, as a share of the mean square."""
    counts = histogram.all_counts()
    x = (torch.arange(len(counts), dtype=torch.float64) + 0.5) * max(histogram.width, 1e-30)
    top = 2 ** (bits - 1) - 1
    scale = max(most, 1e-30) / top
    left = (x / scale).round().clamp(max=top) * scale
    return (((left - x).square() @ counts) / (x.square() @ counts).clamp(min=1e-300)).item()


RANGES: dict[str, Callable[[Histogram, int], float]] = {
    "minmax": minmax,
    "percentile": partial(percentile),
    "mse": mse,
    "kl": kl,
}
