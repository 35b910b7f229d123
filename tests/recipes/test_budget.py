"""The solver against all combinations, and what must hold for any budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.recipes.budget import Choice, NoSolutionError, smallest, solve

SIZES = st.integers(0, 40)
DAMAGES = st.one_of(st.floats(0, 10), st.sampled_from([0.0, 1.0, 2.0]))
ITEMS = st.lists(
    st.lists(st.builds(Choice, st.just("c"), SIZES, DAMAGES), min_size=1, max_size=4), min_size=1, max_size=6
)


def brute_force(items: list[list[Choice]], budget: int) -> float | None:
    totals = [
        sum(choice.damage for choice in chosen)
        for chosen in itertools.product(*items)
        if sum(choice.n_bytes for choice in chosen) <= budget
    ]
    return min(totals) if totals else None


@given(items=ITEMS, budget=st.integers(0, 200))
@settings(max_examples=500, deadline=None)
def test_six_items_of_four_choices_are_those_of_brute_force(items: list[list[Choice]], budget: int) -> None:
    best = brute_force(items, budget)
    if best is None:
        with pytest.raises(NoSolutionError) as error:
            solve(items, budget)
        assert error.value.least == sum(min(choice.n_bytes for choice in item) for item in items)
        return
    found = solve(items, budget)
    picked = [item[c] for item, c in zip(items, found.chosen, strict=True)]
    assert found.n_bytes == sum(choice.n_bytes for choice in picked) <= budget
    assert found.damage == pytest.approx(sum(choice.damage for choice in picked))
    assert found.damage == pytest.approx(best, abs=1e-9)
    assert found.bound <= best + 1e-9


@given(items=ITEMS, most=st.floats(0, 40))
@settings(max_examples=300, deadline=None)
def test_the_smallest_that_keeps_a_promise(items: list[list[Choice]], most: float) -> None:
    fits = [
        sum(choice.n_bytes for choice in chosen)
        for chosen in itertools.product(*items)
        if sum(choice.damage for choice in chosen) <= most
    ]
    if not fits:
        with pytest.raises(NoSolutionError):
            smallest(items, most)
        return
    found = smallest(items, most)
    assert found.damage <= most
    assert found.n_bytes == min(fits)


def model(n: int, seed: int) -> list[list[Choice]]:
    """Items like those of a language model: a few shapes, damage falling fourfold with every bit."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(n):
        weights, level = int(rng.choice([110592, 331776, 884736])), float(rng.lognormal())
        bits = (2.0625, 2.3125, 2.5625, 3.0625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5)
        noise = rng.lognormal(0, 0.1, len(bits))
        items.append(
            [Choice(str(b), int(weights * b / 8), level * 4.0**-b * e) for b, e in zip(bits, noise, strict=True)]
        )
    return items


def test_a_model_of_210_tensors_is_solved_to_the_bound_and_larger_budgets_lose_less() -> None:
    items = model(210, 0)
    least, most = (sum(f(c.n_bytes for c in item) for item in items) for f in (min, max))
    previous = float("inf")
    for budget in np.linspace(least, most, 26).astype(int).tolist():
        found = solve(items, budget)
        assert found.n_bytes <= budget
        assert found.damage <= previous
        steps = [item[c - 1].damage - item[c].damage for item, c in zip(items, found.chosen, strict=True) if c]
        assert found.damage - found.bound <= max(steps, default=0.0)  # within one item of the optimum
        previous = found.damage


def test_what_is_better_in_both_is_always_taken() -> None:
    items = [[Choice("large and bad", 10, 5.0), Choice("small and good", 5, 1.0)]] * 3
    assert solve(items, 100).chosen == (1, 1, 1)


def test_nothing_to_choose() -> None:
    assert solve([], 10).chosen == ()


def test_damages_that_are_nearly_nothing() -> None:
    items = [[Choice("c", 13, 0.0)], [Choice("c", 13, 0.0)], [Choice("c", 13, 2.8e-59), Choice("c", 14, 0.0)]]
    assert solve(items, 39).damage == 2.8e-59
    assert solve(items, 40).damage == 0.0
