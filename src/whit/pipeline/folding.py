"""Transforms of one block before it is rounded: factors chosen, folded into the plan's steps, and checked by a run.

A step is rewritten so that what it reads is already divided by rows; what multiplies its columns is kept beside it,
because the moments of its inputs change with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from whit.calibration.moments import Moments
from whit.grids.floats import Float
from whit.grids.grid import Adaptive
from whit.models.architecture import GGUFView, Part
from whit.models.links import Links
from whit.models.stream import BlockStream
from whit.pipeline.plan import Step
from whit.pipeline.rounder import Rounder
from whit.rounding.curvature import Curvature
from whit.rounding.methods import FLOORS
from whit.transforms.absorb import Pair, block_pairs
from whit.transforms.awq import Sample, column_factors, sampled
from whit.transforms.smooth import smooth_factors

UNCHANGED = 1e-3  # relative change of a block's output up to which a fold has left the function as it was
FACTORS = "factors"


@dataclass(frozen=True)
class _Choice:
    """A pair for which factors are to be chosen; the curvature follows from what is seen."""

    pair: Pair
    samples: list[Sample]
    seen: Moments
    tokens: Tensor | None
    c: Curvature | None = None


@dataclass(frozen=True)
class Folded:
    """What folding changed.

    steps    rewritten ones, by tensor name
    columns  [cols] factors that the columns of a matrix are multiplied with when it is rounded
    """

    steps: dict[str, Step]
    columns: dict[str, Tensor]


def folded(
    pairs: list[Pair],
    steps: Mapping[str, Step],
    moments: Callable[[str], Moments | None],
    rounder: Rounder,
    smooth: bool = False,
) -> Folded:
    """Choose factors for every pair and fold them.

    steps    the block's, by tensor name
    moments  of what arrives at a matrix
    smooth   whether that is quantized too; moments hold some of it
    """
    todo: list[_Choice] = []
    for pair in pairs:
        involved = [steps[name] for name in (*pair.producers, *pair.consumers)]
        seen = moments(pair.consumers[0])
        samples = _samples(pair, steps)
        stored = any(step.stored is not None and not isinstance(step.grid, Float) for step in involved)
        if samples and not stored and seen is not None and not seen.is_empty:
            todo.append(_Choice(pair, samples, seen, seen.tokens if smooth else None))
    chosen = rounder.ranks.spread(
        _chosen,
        todo,
        lambda each: len(each.samples) * len(each.pair.channel) ** 1.2,
        lambda each: replace(each, c=rounder.curvature_of(each.seen)),
    )
    result = Folded({}, {})
    for each, found in zip(todo, chosen, strict=True):
        if len(found[FACTORS]):
            _fold(each.pair, found[FACTORS], steps, result)
    return result


def pairs_of(view: GGUFView, index: int, steps: Mapping[str, Step]) -> tuple[str, list[Pair]]:
    """What stands before a block's tensors, and which of them may be rescaled together."""
    found = re.match(r"blk\.\d+\.", next(iter(steps), ""))
    if found is None:
        return "", []
    heads = view.metadata.get(f"{view.architecture}.attention.head_count_kv", 0)
    shapes = {name: step.tensor.shape for name, step in steps.items()}
    return found[0], block_pairs(shapes, found[0], heads[index] if isinstance(heads, list) else heads)


def sound_pairs(
    stream: BlockStream, links: Links, prefix: str, pairs: list[Pair], steps: Mapping[str, Step], window: Tensor
) -> set[str]:
    """The first producers of the first block's pairs that leave the function alone, which a run of it decides.

    prefix  of its tensors, left out of the result
    window  [1, length, hidden] that it is given
    """
    stream.fill(0)
    before, sound = stream.run(0, window), set[str]()
    for pair in pairs:
        for name, values in trial(pair, steps):
            links.replace(name, values)
        stream.fill(0)
        if unchanged(before, stream.run(0, window)):
            sound.add(pair.producers[0].removeprefix(prefix))
        links.restore()
    return sound


def trial(pair: Pair, steps: Mapping[str, Step]) -> list[tuple[str, Tensor]]:
    """Values of all tensors of a pair folded with factors that nobody would choose: a block must not notice."""
    return folded_values(pair, torch.arange(int(pair.channel.max()) + 1).sin().div(2).exp(), steps)


def folded_values(pair: Pair, t: Tensor, steps: Mapping[str, Step]) -> list[tuple[str, Tensor]]:
    """Names and values of all tensors of a pair folded with t [channels]."""
    result = Folded({}, {})
    _fold(pair, t, steps, result)
    tensors = []
    for name in (*pair.producers, *pair.consumers):
        values = result.steps.get(name, steps[name]).tensor.read()
        tensors.append((name, values * result.columns[name] if name in result.columns else values))
    return tensors


def unchanged(before: Tensor, after: Tensor) -> bool:
    """Whether two outputs of a block are the same but for rounding errors."""
    return bool((after - before).norm() <= UNCHANGED * before.norm())


def _fold(pair: Pair, t: Tensor, steps: Mapping[str, Step], result: Folded) -> None:
    for name in pair.producers:
        result.steps[name] = _rows_divided(result.steps.get(name, steps[name]), t)
    columns = t[pair.channel]  # one tensor for all: they share a curvature
    for name in pair.consumers:
        step = result.steps.get(name, steps[name])
        if step.needs_moments:
            result.columns[name] = columns
        else:
            result.steps[name] = _columns_multiplied(step, columns)


def _chosen(choice: _Choice) -> dict[str, Tensor]:
    c, channel = cast(Curvature, choice.c), choice.pair.channel
    if choice.tokens is None:
        t = column_factors(choice.samples, c, channel)
    else:  # inputs are quantized too
        t = smooth_factors(choice.samples, choice.tokens, c.H.diagonal().float(), channel)
    return {FACTORS: torch.empty(0) if t is None else t}


def _samples(pair: Pair, steps: Mapping[str, Step]) -> list[Sample]:
    consumers = [steps[name] for name in pair.consumers]
    rounded = [step for step in consumers if step.needs_moments and step.rounding in FLOORS]
    return sampled((step.tensor.read(), cast(Adaptive, step.grid)) for step in rounded)


def _rows_divided(step: Step, t: Tensor) -> Step:
    parts, start = [], 0
    for part in step.tensor.parts:
        rows = t[start : start + part.shape[0]]
        parts.append(_wrapped(part, (1 / rows).view(-1, *[1] * (len(part.shape) - 1))))
        start += part.shape[0]
    return replace(step, tensor=replace(step.tensor, parts=tuple(parts)), stored=None)


def _columns_multiplied(step: Step, t: Tensor) -> Step:
    parts = tuple(_wrapped(part, t) for part in step.tensor.parts)
    return replace(step, tensor=replace(step.tensor, parts=parts), stored=None)


def _wrapped(part: Part, factor: Tensor) -> Part:
    return Part(part.shape, lambda: part.read().float() * factor)
