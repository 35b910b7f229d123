"""Levels of least weighted squared error in one dimension: k-means, solved exactly.

    minimise  sum_i v_i (x_i - c_z(i))^2     over k levels c and a level z(i) for every number

Sorted, every cluster is an interval, and which intervals is a shortest path: D[m][j] = min_i D[m-1][i] + cost(i, j).
Prefix sums of v, v x and v x^2 give any cost in a few operations, and because the cost is Monge the best i never falls
when j grows, so that halving finds a layer in n log n steps instead of n^2. The obvious version, Lloyd's iteration, is
here for comparison: it ends where it began if it begins badly.

The path is found in C++ (kernels/native/segments.cpp) or in numpy, by the same operations in the same order. All sums
are float64, about the row's mean. Source: docs/quantizers.md; Wu 1991; arXiv 1701.07204 (Ckmeans.1d.dp and after).
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from whit.native import LIBRARY

MOST = 1 << 16  # numbers of a row that are told apart; of more, neighbours are put together first
ITERATIONS = 20  # of Lloyd
NOTHING = 1e-300  # a mass that is zero, so that no division is by zero
_CHUNK = 1 << 21  # numbers whose prefix sums exist at a time


def kmeans(x: Tensor, weights: Tensor, k: int) -> Tensor:
    """The k levels of every row that leave the least weighted squared error, ascending: [rows, k] float32.

    x        [rows, n] float, finite, in any order
    weights  [rows, n], non-negative; a row without any weight counts all numbers alike
    Rows of fewer than k numbers, or different ones, have some levels twice. Exact for rows of up to MOST numbers; of
    longer ones neighbours are put together until MOST are left, as densely as levels would be.
    Raises ValueError for k below 1.
    """
    if k < 1:
        raise ValueError(f"k-means needs at least one level, found {k}")
    rows = max(1, _CHUNK // max(1, x.shape[1]))
    parts = [_solved(*each, k) for each in zip(x.split(rows), weights.expand_as(x).split(rows), strict=True)]
    return torch.cat(parts) if parts else x.new_empty(0, k, dtype=torch.float32)


def lloyd(x: Tensor, weights: Tensor, levels: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Lloyd's iteration from `levels` [rows, k]: every number to its nearest level, every level to its numbers' mean.

    x, weights  [rows, n]; weights non-negative
    A level that nothing with a weight is nearest to stays where it is. Returns [rows, k] float32, ascending.
    Source: Lloyd 1982.
    """
    x, v, found = x.double(), weights.expand_as(x).double(), levels.double().sort(1).values
    for _ in range(iterations):
        codes = torch.searchsorted((found[:, 1:] + found[:, :-1]) / 2, x)
        mass = torch.zeros_like(found).scatter_add_(1, codes, v)
        total = torch.zeros_like(found).scatter_add_(1, codes, v * x)
        found = torch.where(mass > 0, total / mass.clamp(min=NOTHING), found).sort(1).values
    return found.float()


def segments(mass: Tensor, first: Tensor, second: Tensor, k: int) -> Tensor:
    """Where the k cheapest segments of sorted numbers begin: [rows, k] int32, the first 0.

    mass, first, second  [rows, n + 1] float64, prefix sums of v, v x and v x^2 beginning with 0; 1 <= k <= n
    Every segment holds a number; of equal cuts the first.
    """
    mass, first, second = mass.contiguous(), first.contiguous(), second.contiguous()
    function = getattr(LIBRARY, "whit_segments", None)
    if function is None:
        return torch.from_numpy(_plain_segments(mass.numpy(), first.numpy(), second.numpy(), k))
    rows, n = mass.shape[0], mass.shape[1] - 1
    cuts = torch.empty(rows, k, dtype=torch.int32)
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in (mass, first, second)]
    sizes = [ctypes.c_int64(size) for size in (rows, n, k)]
    function(*pointers, *sizes, ctypes.c_void_p(cuts.data_ptr()), torch.get_num_threads())
    return cuts


def _solved(x: Tensor, v: Tensor, k: int) -> Tensor:
    """As `kmeans`, all rows at once."""
    device = x.device
    x, order = x.cpu().double().sort(1)
    v = v.cpu().double().gather(1, order)
    v = torch.where(v.sum(1, keepdim=True) > 0, v, 1.0)
    n = x.shape[1]
    if n > MOST:
        x, v = _together(x, v)
    wanted = min(k, x.shape[1])
    # about the mean: prefix sums would lose a small spread beside a large offset
    mean = (v * x).sum(1, keepdim=True) / v.sum(1, keepdim=True)
    away = x - mean
    cuts = segments(_prefix(v), _prefix(v * away), _prefix(v * away * away), wanted).long()
    which = torch.zeros_like(x, dtype=torch.int64)
    if wanted > 1:
        which = which.scatter_add_(1, cuts[:, 1:], torch.ones_like(cuts[:, 1:])).cumsum(1)
    mass, total, count, plain = (
        torch.zeros(x.shape[0], wanted, dtype=torch.float64).scatter_add_(1, which, each)
        for each in (v, v * away, torch.ones_like(x), away)
    )
    levels = torch.where(mass > NOTHING, total / mass.clamp(min=NOTHING), plain / count) + mean
    # a segment without weight, or one of equal numbers, may have its mean out of order by a rounding error
    levels = levels.sort(1).values
    return torch.nn.functional.pad(levels[:, None], (0, k - wanted), mode="replicate")[:, 0].float().to(device)


def _prefix(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def _together(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted numbers [rows, n] with weights as MOST of them, each the mean of neighbours with the sum of their weights.

    They are as dense as the cube root of the weights' density, which is where levels are needed (Panter and Dite
    1951), so that a number far from all others stays alone.
    """
    width = x[:, 1:] - x[:, :-1]
    measure = _prefix((v[:, 1:] + v[:, :-1]).pow(1 / 3) * width.pow(2 / 3))
    share = measure / measure[:, -1:].clamp(min=NOTHING)
    which = (share * (MOST - 1)).round().long()
    mass = torch.zeros(x.shape[0], MOST, dtype=torch.float64).scatter_add_(1, which, v)
    total = torch.zeros_like(mass).scatter_add_(1, which, v * x)
    # empty ones have no weight and lie where their neighbour does
    at = torch.where(mass > 0, total / mass.clamp(min=NOTHING), -torch.inf).cummax(1).values
    return torch.where(torch.isfinite(at), at, x[:, :1]), mass


def _plain_segments(mass: np.ndarray, first: np.ndarray, second: np.ndarray, k: int) -> np.ndarray:
    """`segments` in numpy, row by row."""
    cuts = np.zeros((mass.shape[0], k), dtype=np.int32)
    for row, sums in enumerate(zip(mass, first, second, strict=True)):
        n = len(sums[0]) - 1
        before = np.concatenate([[np.inf], _cost(sums, np.zeros(n, dtype=np.int64), np.arange(1, n + 1))])
        layers = []
        for m in range(2, k + 1):
            before, cut = _layer(sums, before, m, n)
            layers.append(cut)
        end = n
        for m in range(k - 1, 0, -1):
            end = layers[m - 1][end]
            cuts[row, m] = end
    return cuts


def _cost(sums: tuple[np.ndarray, ...], i: np.ndarray, j: np.ndarray) -> np.ndarray:
    mass, first, second = sums
    moved, left = first[j] - first[i], second[j] - second[i]
    return np.maximum(left - moved * moved / np.maximum(mass[j] - mass[i], NOTHING), 0.0)


def _layer(sums: tuple[np.ndarray, ...], before: np.ndarray, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs [n + 1] of m segments and where the last of them begins, all middles of one depth at a time."""
    best, cut = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
    low, high, start, stop = (np.array([each]) for each in (m, n, m - 1, n - 1))
    while low.size:
        middle = low + (high - low) // 2
        counts = np.minimum(stop, middle - 1) - start + 1
        begins = np.cumsum(counts) - counts
        i = np.arange(counts.sum()) - np.repeat(begins - start, counts)
        found = before[i] + _cost(sums, i, np.repeat(middle, counts))
        least = np.minimum.reduceat(found, begins)
        candidates = np.where(found == np.repeat(least, counts), i, n)
        where = np.minimum.reduceat(candidates, begins)
        best[middle], cut[middle] = least, where
        low, high, start, stop = (
            np.concatenate(pair) for pair in ((low, middle + 1), (middle - 1, high), (start, where), (where, stop))
        )
        alive = low <= high
        low, high, start, stop = low[alive], high[alive], start[alive], stop[alive]
    return best, cut
