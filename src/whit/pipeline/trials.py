"""Allocations tried for real: files written and measured on text that neither the sweep nor the rounding has seen.

A prediction adds up what tensors cost one by one, for a rounding that is not quite what will be done. Two things need
the truth: a promise of a divergence, and repair, which doubts the prediction for one kind of tensor at a time. If the
costs of a kind (embedding, value projections, first and last blocks, ...) are taken for more or less than predicted and
the budget is solved again, some of its tensors move up and others down; that swap is kept if the divergence clearly
falls.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whit.devices import CPU
from whit.errors import RecipeError
from whit.evaluation.compare import final_states, token_measures
from whit.evaluation.divergence import mean_and_error
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.allocate import Allocation, Allocator, Damages
from whit.pipeline.effort import Calibration
from whit.pipeline.folder import write_model
from whit.pipeline.quantize import Result

Progress = Callable[[int, int, str], None]
DOUBT = 1.6  # by which the costs of a kind are taken for more, or for less
CLEARLY = 2.0  # standard errors of the paired difference
PROMISES = 5  # files tried to keep one


@dataclass(frozen=True)
class Trial:
    """A file that was written and measured.

    kl  [tokens] float64, divergence from the original
    """

    allocation: Allocation
    result: Result
    kl: Tensor

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.kl.mean().item()


class Trials:
    """Writes and measures."""

    def __init__(self, model: Model, calibration: Calibration | None, windows: Tensor, folder: Path, tell: Progress):
        """windows  [n, length] int64 that nothing else has seen; folder  for the files"""
        self._model, self._calibration, self._windows, self._folder = model, calibration, windows, folder
        self._tell, self._n = tell, 0
        self._device = CPU if calibration is None else calibration.device
        self._reference = final_states(model, windows, device=self._device)

    def of(self, allocation: Allocation, what: str) -> Trial:
        """One file."""
        self._n += 1
        path = self._folder / (f"{self._n}.gguf" if allocation.recipe.layout == "gguf" else str(self._n))

        def tell(done: int, total: int, part: str) -> None:
            self._tell(done, total, f"{what}: {part}")

        result = write_model(self._model, allocation.recipe, path, True, tell, self._calibration)
        states = final_states(open_model(path), self._windows, device=self._device)
        return Trial(allocation, result, token_measures(states, self._reference, self._windows).kl)


def repaired(allocator: Allocator, damages: Damages, n_bytes: int, trials: Trials, n: int) -> tuple[Trial, list[str]]:
    """The best of up to n files of at most `n_bytes` after the predicted one, and what was found on the way."""
    best = trials.of(allocator.fit(damages, n_bytes), "as predicted")
    believed, said = damages, [f"as predicted: KL {best.mean:.4g}"]
    seen = {best.allocation.recipe}
    for what, factors in _doubts(damages):
        if n == 0:
            break
        doubted = {
            name: {grid: factors[name] * each for grid, each in grids.items()} for name, grids in believed.items()
        }
        found = allocator.fit(doubted, n_bytes)
        if found.recipe in seen:
            continue
        seen.add(found.recipe)
        n -= 1
        tried = trials.of(found, what)
        mean, error = mean_and_error(tried.kl - best.kl)
        kept = mean < -CLEARLY * error
        said.append(f"{what}: KL {tried.mean:.4g}{', kept' if kept else ''}")
        if kept:
            _remove(best.result.path)
            best, believed = tried, doubted
        else:
            _remove(tried.result.path)
    return best, said


def promised(allocator: Allocator, damages: Damages, most: float, trials: Trials) -> tuple[Trial, list[str]]:
    """The smallest file found that loses at most `most` nats per token, measured, and what was found on the way.

    Raises RecipeError when none does.
    """
    said, best, target = list[str](), None, most
    seen = set()
    least = allocator.fit(damages, allocator.most).damage
    passed, failed = 0.0, math.inf  # the largest prediction that kept it, the smallest that did not
    for n in range(PROMISES):
        last = best is None and n == PROMISES - 1
        wanted = allocator.promise(damages, least if last else max(target, least))
        if wanted.recipe in seen:
            if best is not None or wanted.damage <= least:
                break
            wanted = allocator.promise(damages, least)
        seen.add(wanted.recipe)
        tried = trials.of(wanted, f"{wanted.n_bytes / 1e6:.1f} MB")
        said.append(f"{wanted.n_bytes:,} bytes: KL {tried.mean:.4g}")
        if tried.mean <= most and (best is None or wanted.n_bytes < best.allocation.n_bytes):
            if best is not None:
                _remove(best.result.path)
            best = tried
        else:
            _remove(tried.result.path)
        if tried.mean <= most:
            passed = max(passed, wanted.damage)
        else:
            failed = min(failed, wanted.damage)
        if best is not None and (0.93 * most < best.mean or best.allocation.n_bytes <= allocator.least):
            break
        # On a logarithmic scale prediction and truth are nearly a constant apart; a little below the promise is enough.
        target = wanted.damage * 0.97 * most / tried.mean if tried.mean > 0 else math.inf
        if not passed < target < failed:  # between what is known, where one step leaves it
            target = (passed * failed) ** 0.5 if passed > 0 and failed < math.inf else failed / 4 or 4 * passed
            target = 4 * passed if failed == math.inf else target
    if best is None:
        raise RecipeError(
            f"No file kept KL at or below {most:g}, the largest neither (tried: {'; '.join(said)}). Promise less, or "
            "take a preset that does more."
        )
    return best, said


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _doubts(damages: Damages) -> Iterator[tuple[str, dict[str, float]]]:
    """Kinds of tensors whose costs may be more or less than predicted, the largest share of the loss first."""
    kinds: dict[str, list[str]] = {}
    for name in damages:
        kinds.setdefault(re.sub(r"^blk\.\d+\.|\.weight$", "", name), []).append(name)
    blocks = sorted({int(found[1]) for name in damages if (found := re.match(r"blk\.(\d+)\.", name))})
    n = max(1, len(blocks) // 8)
    for what, some in (("first blocks", blocks[:n]), ("last blocks", blocks[-n:])):
        kinds[what] = [name for name in damages if any(name.startswith(f"blk.{index}.") for index in some)]
    weight = {kind: sum(_typical(damages[name]) for name in names) for kind, names in kinds.items()}
    for kind in sorted(kinds, key=lambda each: -weight[each]):
        for factor in (DOUBT, 1 / DOUBT):
            word = "more" if factor > 1 else "less"
            yield f"{kind} costs {word}", {name: factor if name in kinds[kind] else 1.0 for name in damages}


def _typical(grids: Mapping[str, float]) -> float:
    values = torch.tensor(list(grids.values()), dtype=torch.float64)
    return values.clamp(min=1e-30).log().mean().exp().item()
