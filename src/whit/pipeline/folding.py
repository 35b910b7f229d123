"""Transforms of one block before it is rounded: factors chosen, folded into the plan's steps, and checked by a run.

A step is rewritten so that what it reads is already divided by rows; what multiplies its columns is kept beside it,
because the moments of its inputs change with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whit.calibration.moments import Moments
from whit.models.architecture import GGUFTensor, Part
from whit.pipeline.plan import Step
from whit.pipeline.rounder import Rounder
from whit.transforms.absorb import Pair
from whit.transforms.awq import Sample, column_factors, sampled

UNCHANGED = 1e-3  # relative change of a block's output up to which a fold has left the function as it was
METHOD = "feedback"  # other roundings are what their names say, of the weights as they are


@dataclass(frozen=True)
class Folded:
    """What folding changed.

    steps    rewritten ones, by tensor name
    columns  [cols] factors that the columns of a matrix are multiplied with when it is rounded
    """

    steps: dict[str, Step]
    columns: dict[str, Tensor]


def folded(
    pairs: list[Pair], steps: Mapping[str, Step], moments: Callable[[str], Moments | None], rounder: Rounder
) -> Folded:
    """Choose factors for every pair and fold them.

    steps    the block's, by tensor name
    moments  of what arrives at a matrix
    """
    result = Folded({}, {})
    for pair in pairs:
        involved = [steps[name] for name in (*pair.producers, *pair.consumers)]
        seen = moments(pair.consumers[0])
        if any(step.stored is not None and step.kind.fields for step in involved) or seen is None or seen.is_empty:
            continue
        t = _chosen(pair, {**steps, **result.steps}, seen, rounder)
        if t is not None:
            _fold(pair, t, steps, result)
    return result


def trial(pair: Pair, steps: Mapping[str, Step]) -> list[tuple[str, Tensor]]:
    """Values of all tensors of a pair folded with factors that nobody would choose: a block must not notice."""
    result = Folded({}, {})
    _fold(pair, torch.arange(int(pair.channel.max()) + 1).sin().div(2).exp(), steps, result)
    tensors = []
    for name in (*pair.producers, *pair.consumers):
        values = _read(result.steps.get(name, steps[name]).tensor)
        tensors.append((name, values * result.columns[name] if name in result.columns else values))
    return tensors


def unchanged(before: Tensor, after: Tensor) -> bool:
    """Whether two outputs of a block are the same but for rounding errors."""
    return bool((after - before).norm() <= UNCHANGED * before.norm())


def _fold(pair: Pair, t: Tensor, steps: Mapping[str, Step], result: Folded) -> None:
    for name in pair.producers:
        result.steps[name] = _rows_divided(result.steps.get(name, steps[name]), t)
    for name in pair.consumers:
        step = result.steps.get(name, steps[name])
        if step.needs_moments:
            result.columns[name] = t[pair.channel]
        else:
            result.steps[name] = _columns_multiplied(step, t[pair.channel])


def _chosen(pair: Pair, steps: Mapping[str, Step], moments: Moments, rounder: Rounder) -> Tensor | None:
    samples: list[Sample] = []
    for name in pair.consumers:
        step = steps[name]
        if step.needs_moments and step.rounding == METHOD:
            samples.append(sampled(_read(step.tensor), step.kind.grid))  # type: ignore[arg-type]
    return column_factors(samples, rounder.curvature_of(moments), pair.channel) if samples else None


def _read(tensor: GGUFTensor) -> Tensor:
    return torch.cat([part.read() for part in tensor.parts]).float()


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
