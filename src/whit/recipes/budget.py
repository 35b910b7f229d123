"""The best choice per item under a budget of bytes: a multiple-choice knapsack, solved exactly.

    minimise  sum_i damage_i(c_i)   subject to   sum_i bytes_i(c_i) <= budget

A price per byte turns this into independent choices: for every price mu >= 0 the cheapest choices of
damage + mu * bytes give a lower bound on what any solution loses, and the price at which their bytes just fit gives a
solution within one item of the optimum. Whatever this bound rules out is dropped; the few choices that are left are
combined in full, keeping only combinations that no other beats in both bytes and damage.

Pure numbers: what an item is, where damages come from and how large a file is belongs to others.
Source: Sinha and Zoltners 1979 (bounds), Pisinger 1995 (a core solved by dynamic programming).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_STATES = 200_000  # combinations kept at once; beyond it the least promising go, and the bound says what that cost
ITERATIONS = 100


@dataclass(frozen=True)
class Choice:
    """One way to store an item.

    name     what it is called
    n_bytes  what it takes
    damage   what it loses, in any unit that adds up
    """

    name: str
    n_bytes: int
    damage: float


@dataclass(frozen=True)
class Solution:
    """What was chosen.

    chosen   per item the index of its choice
    n_bytes  of all together
    damage   of all together
    bound    no solution loses less than this
    """

    chosen: tuple[int, ...]
    n_bytes: int
    damage: float
    bound: float


class NoSolutionError(ValueError):
    """Nothing fits. `least` is the smallest budget that something fits in."""

    def __init__(self, budget: float, least: float) -> None:
        super().__init__(f"nothing fits in {budget}; the least is {least}")
        self.least = least


def solve(items: Sequence[Sequence[Choice]], budget: int) -> Solution:
    """The choices that lose least within `budget` bytes. Raises NoSolutionError with the smallest possible size."""
    bytes_ = [np.array([choice.n_bytes for choice in item], dtype=np.int64) for item in items]
    damage = [np.array([choice.damage for choice in item], dtype=np.float64) for item in items]
    least = sum(int(each.min()) for each in bytes_)
    if least > budget:
        raise NoSolutionError(budget, least)
    price, bound = _price(bytes_, damage, budget)
    chosen = _filled(bytes_, damage, price, budget)
    best = sum(float(d[c]) for d, c in zip(damage, chosen, strict=True))
    chosen = _combined(bytes_, damage, price, budget, bound, best) or chosen
    total = sum(int(b[c]) for b, c in zip(bytes_, chosen, strict=True))
    lost = sum(float(d[c]) for d, c in zip(damage, chosen, strict=True))
    return Solution(tuple(chosen), total, lost, min(bound, lost))


def smallest(items: Sequence[Sequence[Choice]], most: float) -> Solution:
    """The choices that take fewest bytes while losing at most `most`: the same problem with its sides exchanged.

    Raises NoSolutionError with the least damage that is possible.
    """
    least = sum(min(choice.damage for choice in item) for item in items)
    if least > most:
        raise NoSolutionError(most, least)
    low, high = sum(min(c.n_bytes for c in item) for item in items), sum(max(c.n_bytes for c in item) for item in items)
    found = solve(items, high)
    while low < high:  # a larger budget never loses more
        middle = (low + high) // 2
        tried = solve(items, middle)
        if tried.damage <= most:
            found, high = tried, tried.n_bytes if tried.n_bytes < middle else middle
        else:
            low = middle + 1
    return found


def _price(bytes_: list[np.ndarray], damage: list[np.ndarray], budget: int) -> tuple[float, float]:
    """The price per byte at which the cheapest choices just fit, and the best lower bound on the way there."""

    def at(price: float) -> tuple[int, float]:
        picks = [int(np.lexsort((b, d + price * b))[0]) for b, d in zip(bytes_, damage, strict=True)]
        size = sum(int(b[c]) for b, c in zip(bytes_, picks, strict=True))
        return size, sum(float(d[c] + price * b[c]) for b, d, c in zip(bytes_, damage, picks, strict=True))

    size, value = at(0.0)
    if size <= budget:
        return 0.0, value
    low, high, bound = 0.0, 1e-30, value  # damage alone is a bound too
    while at(high)[0] > budget:
        low, high = high, high * 16
    for _ in range(ITERATIONS):
        middle = (low * high) ** 0.5 if low > 0 else high / 16
        size, value = at(middle)
        bound = max(bound, value - middle * budget)
        low, high = (low, middle) if size <= budget else (middle, high)
        if high - low <= 1e-15 * high:
            break
    return high, max(bound, at(high)[1] - high * budget)


def _filled(bytes_: list[np.ndarray], damage: list[np.ndarray], price: float, budget: int) -> list[int]:
    """The cheapest choices at this price, then upgrades by their worth per byte as long as one fits."""
    chosen = [int(np.lexsort((b, d + price * b))[0]) for b, d in zip(bytes_, damage, strict=True)]
    left = budget - sum(int(b[c]) for b, c in zip(bytes_, chosen, strict=True))
    while True:
        best, which = 0.0, (-1, -1)
        for i, (b, d) in enumerate(zip(bytes_, damage, strict=True)):
            more, gain = b - b[chosen[i]], d[chosen[i]] - d
            fits = (more <= left) & (gain > 0)
            worth = np.where(fits, gain / np.maximum(more, 1), 0.0)
            if worth.size and worth.max() > best:
                best, which = float(worth.max()), (i, int(worth.argmax()))
        if which[0] < 0:
            return chosen
        i, c = which
        left -= int(bytes_[i][c] - bytes_[i][chosen[i]])
        chosen[i] = c


def _combined(
    bytes_: list[np.ndarray], damage: list[np.ndarray], price: float, budget: int, bound: float, best: float
) -> list[int] | None:
    """The best of all combinations that the bound does not rule out; None when none beats `best`."""
    # What sums of this size are rounded by must not rule anything out.
    slack = max(best - bound, 0.0) * (1 + 1e-9) + 1e-12 * (abs(best) + price * budget)
    over = [d + price * b - (d + price * b).min() for b, d in zip(bytes_, damage, strict=True)]  # above the cheapest
    kept = [np.flatnonzero(each <= slack) for each in over]
    order = sorted(range(len(kept)), key=lambda i: -len(kept[i]))
    least_after = np.cumsum([0, *(int(bytes_[i][kept[i]].min()) for i in reversed(order))])[::-1][1:]
    size, lost, excess = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of every state its parent and its choice
    for i, after in zip(order, least_after, strict=True):
        options = kept[i]
        parent = np.repeat(np.arange(size.size), options.size)
        choice = np.tile(options, size.size)
        new_size, new_lost = size[parent] + bytes_[i][choice], lost[parent] + damage[i][choice]
        new_excess = excess[parent] + over[i][choice]
        alive = np.flatnonzero((new_size + after <= budget) & (new_excess <= slack))
        alive = alive[np.lexsort((new_lost[alive], new_size[alive]))]
        falling = np.minimum.accumulate(new_lost[alive])
        alive = alive[np.concatenate([[True], new_lost[alive][1:] < falling[:-1]])] if alive.size else alive
        if alive.size > MOST_STATES:
            alive = np.sort(alive[np.argsort(new_excess[alive], kind="stable")[:MOST_STATES]])
        if not alive.size:
            return None
        size, lost, excess = new_size[alive], new_lost[alive], new_excess[alive]
        steps.append((parent[alive], choice[alive]))
    state = int(lost.argmin())
    if lost[state] >= best:
        return None
    chosen = [0] * len(order)
    for i, (parents, choices) in zip(reversed(order), reversed(steps), strict=True):
        chosen[i], state = int(choices[state]), int(parents[state])
    return chosen
