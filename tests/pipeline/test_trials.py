"""Promises, kept with files whose divergence is made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import torch

from whit.errors import RecipeError
from whit.pipeline.allocate import Allocation, Allocator
from whit.pipeline.quantize import Result
from whit.pipeline.trials import Trial, Trials, promised
from whit.recipes.recipe import Recipe, Rule

SIZES = {f"q{n}": (100 - 10 * n, 0.001 * 4.0**n) for n in range(8)}  # bytes, predicted


class MadeUp:
    """Eight files, smaller ones losing more."""

    least, most = min(n for n, _ in SIZES.values()), max(n for n, _ in SIZES.values())

    def promise(self, damages: object, most: float) -> Allocation:
        size, damage = min(each for each in SIZES.values() if each[1] <= most * 1.000001)
        return Allocation(Recipe(f"{size}", (Rule("*", "f16"),)), size, damage, 0.0)

    def fit(self, damages: object, n_bytes: int) -> Allocation:
        size, damage = min((each for each in SIZES.values() if each[0] <= n_bytes), key=lambda each: each[1])
        return Allocation(Recipe(f"{size}", (Rule("*", "f16"),)), size, damage, 0.0)


@dataclass
class Pretended:
    """Measures what `truth` says of a size."""

    truth: Callable[[int], float]
    folder: Path
    tried: list[int] = field(default_factory=list)

    def of(self, allocation: Allocation, what: str) -> Trial:
        self.tried.append(allocation.n_bytes)
        path = self.folder / f"{len(self.tried)}.gguf"
        path.touch()
        kl = torch.full((10,), self.truth(allocation.n_bytes), dtype=torch.float64)
        return Trial(allocation, cast(Result, Result(path, allocation.n_bytes, None, 0.0)), kl)  # type: ignore[arg-type]


def kept(truth: Callable[[int], float], most: float, folder: Path) -> tuple[Trial, list[int]]:
    trials = Pretended(truth, folder)
    best, _ = promised(cast(Allocator, MadeUp()), {}, most, cast(Trials, trials))
    return best, trials.tried


def predicted(n_bytes: int) -> float:
    return dict(SIZES.values())[n_bytes]


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_the_smallest_file_that_keeps_it_is_found(factor: float, tmp_path: Path) -> None:
    best, tried = kept(lambda size: factor * predicted(size), 0.1, tmp_path)
    assert best.allocation.n_bytes == min(size for size, damage in SIZES.values() if factor * damage <= 0.1)
    assert [each.name for each in tmp_path.iterdir()] == [best.result.path.name]
    assert len(tried) <= 5


def test_a_cliff_is_closed_in_on(tmp_path: Path) -> None:
    best, tried = kept(lambda size: 0.0001 if size >= 70 else 5.0, 0.01, tmp_path)
    assert best.allocation.n_bytes <= 80
    assert len(set(tried)) == len(tried)


def test_files_that_lose_nothing_end_the_search(tmp_path: Path) -> None:
    best, _ = kept(lambda size: 0.0, 0.0, tmp_path)
    assert best.mean == 0


def test_the_largest_file_is_tried_before_a_promise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the largest neither"):
        kept(lambda size: 1.0, 0.01, tmp_path)
    assert list(tmp_path.iterdir()) == []
    best, tried = kept(lambda size: 0.001 if size == 100 else 1.0, 0.01, tmp_path)
    assert best.allocation.n_bytes == 100
    assert tried[-1] == 100
