"""The exact solution of k-means in one dimension: against all partitions, against Lloyd, natively and in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whit.grids import kmeans as module
from whit.grids.kmeans import kmeans, lloyd, segments


def error(x: Tensor, v: Tensor, levels: Tensor) -> Tensor:
    """[rows] float64, every number on its nearest level."""
    away = (x.double()[:, :, None] - levels.double()[:, None]).square().amin(2)
    return (v.double() * away).sum(1)


def least(x: list[float], v: list[float], k: int) -> float:
    """The least error of all partitions into k sets or fewer, intervals or not."""
    numbers, weights, best = np.array(x), np.array(v), np.inf
    for labels in itertools.product(range(k), repeat=len(x) - 1):
        which, total = np.array([0, *labels]), 0.0
        for each in range(k):
            mine, mass = numbers[which == each], weights[which == each]
            if mass.sum() > 0:
                total += float((mass * (mine - (mass * mine).sum() / mass.sum()) ** 2).sum())
        best = min(best, total)
    return best


numbers = st.integers(-6, 6).map(lambda n: n / 2) | st.floats(-3, 3, width=32)
masses = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.25, 7.0, 1e-6, 1e6])


@given(st.lists(st.tuples(numbers, masses), min_size=1, max_size=7), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_no_partition_is_better(pairs: list[tuple[float, float]], k: int) -> None:
    x, v = zip(*pairs, strict=True)
    weights = v if sum(v) > 0 else [1.0] * len(v)
    found = kmeans(torch.tensor([x]), torch.tensor([v]), k)
    assert found.shape == (1, k)
    assert (found.diff(dim=1) >= 0).all()
    wanted = least(list(x), list(weights), k)
    scale = float((np.array(weights) * np.array(x) ** 2).sum())
    got = error(torch.tensor([x]), torch.tensor([weights]), found).item()
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-11 * (1 + scale))


@pytest.mark.parametrize("k", [2, 4, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_lloyd_is_never_better_from_fifty_starts(k: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(6, 160, generator=generator) * torch.rand(6, 160, generator=generator).pow(-0.4)
    v = torch.rand(6, 160, generator=generator).pow(6) if weighted else torch.ones(6, 160)
    exact = error(x, v, kmeans(x, v, k))
    worse = 0
    for _ in range(50):
        start = x.gather(1, torch.rand(x.shape, generator=generator).argsort(1)[:, :k])
        found = error(x, v, lloyd(x, v, start, 100))
        assert (exact <= found * (1 + 1e-6)).all()
        worse += int((found > exact * 1.001).sum())
    assert worse > 0  # the comparison can fail


@pytest.mark.skipif(module.LIBRARY is None, reason="no native library")
@given(
    st.lists(st.lists(st.tuples(numbers, masses), min_size=9, max_size=9), min_size=1, max_size=4),
    st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_numpy_cuts_where_the_library_cuts(rows: list[list[tuple[float, float]]], k: int) -> None:
    both = torch.tensor(rows, dtype=torch.float64)
    order = both[..., 0].sort(1).indices
    x, v = both[..., 0].gather(1, order), both[..., 1].gather(1, order)
    sums = [torch.nn.functional.pad(each.cumsum(1), (1, 0)) for each in (v, v * x, v * x * x)]
    plain = module._plain_segments(*(each.numpy() for each in sums), k)
    assert torch.equal(segments(*sums, k), torch.from_numpy(plain))


@pytest.mark.skipif(module.LIBRARY is None, reason="no native library")
def test_without_the_library_the_levels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(5, 700, generator=generator), torch.rand(5, 700, generator=generator)
    native = kmeans(x, v, 16)
    monkeypatch.setattr(module, "LIBRARY", None)
    assert torch.equal(kmeans(x, v, 16), native)


def test_the_number_of_threads_changes_nothing() -> None:
    x, before = torch.randn(64, 300, generator=torch.Generator().manual_seed(1)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(kmeans(x, torch.ones_like(x), 8))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_rows_of_few_numbers_or_one_have_them_as_levels() -> None:
    x = torch.tensor([[3.0, -1.0, 3.0, -1.0, 3.0, 0.5], [0.375] * 6])
    found = kmeans(x, torch.ones_like(x), 4)
    assert set(found[0].tolist()) == {-1.0, 0.5, 3.0}
    assert found[1].tolist() == [0.375] * 4
    assert kmeans(x[:, :2], torch.ones(2, 2), 4).tolist() == [[-1.0, 3.0, 3.0, 3.0], [0.375] * 4]


def test_numbers_without_weight_do_not_count_and_rows_without_any_count_all() -> None:
    x = torch.tensor([[0.0, 1.0, 10.0, 50.0]])
    found = kmeans(x, torch.tensor([[1.0, 1.0, 1.0, 0.0]]), 2)
    assert error(x, torch.tensor([[1.0, 1.0, 1.0, 0.0]]), found).item() == pytest.approx(0.5)
    assert torch.equal(kmeans(x, torch.zeros(1, 4), 2), kmeans(x, torch.ones(1, 4), 2))


def test_a_large_offset_hides_no_spread() -> None:
    x = 1e6 + torch.tensor([[0.0, 1.0, 8.0, 9.0]])
    assert kmeans(x, torch.ones(1, 4), 2).tolist() == [[1e6 + 0.5, 1e6 + 8.5]]


def test_long_rows_lose_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    x, v = torch.randn(2, 5000, generator=generator), torch.rand(2, 5000, generator=generator).pow(3)
    x[:, 0] = 30.0  # far from all others
    exact = error(x, v, kmeans(x, v, 16))
    monkeypatch.setattr(module, "MOST", 512)
    assert (error(x, v, kmeans(x, v, 16)) <= exact * 1.002).all()


def test_no_level_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one level"):
        kmeans(torch.zeros(1, 3), torch.ones(1, 3), 0)
