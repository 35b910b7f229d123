"""Roundings that look at text on a live model: error feedback above all, for what really arrives at the matrices.

The blocks of the model (its one long list of modules) are taken in order: what arrives at a block's matrices is seen
with all earlier blocks rounded, then they are rounded together, as in the pipeline for files, by the same methods.
What is outside of the blocks comes last. Before that, norms hand factors to the columns after them where that makes
the rounding better (docs/rounding.md, "rescaled columns"). Roundings that ask how much each weight matters to the
predictions are told so for what is in the blocks, as files are (docs/quantizers.md).

A model without such a list is seen once, in float, and rounded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import cast

import torch
from torch import Tensor, nn

from whit.calibration.moments import Moments, pooled
from whit.grids.grid import Adaptive
from whit.grids.quantized import QuantizedTensor
from whit.live.chain import chain_of, states_of
from whit.live.experts import QExpert
from whit.live.fisher import fisher
from whit.live.fold import Pair, fold, pairs_of
from whit.live.modules import QEmbedding
from whit.live.run import Call, hooked, positions, steady, unrounded
from whit.live.twin import Twin
from whit.parallel import spread
from whit.products import coarse_products
from whit.rounding.curvature import Curvature, curvature
from whit.rounding.feedback import adapts
from whit.rounding.methods import FISHER, FLOORED, FLOORS, Effort, rounded
from whit.rounding.nearest import search
from whit.transforms.awq import column_factors, sampled

Progress = Callable[[int, int, str], None]
ROWS = 1024  # rounded at a time, by one core


def feedback(
    model: nn.Module,
    twins: Mapping[str, Twin],
    calls: Sequence[Call],
    effort: Effort,
    progress: Progress | None = None,
    method: str = FLOORED,
) -> None:
    """Round the given unfrozen twins of `model` and fix their codes.

    twins   by name
    calls   the calibration text; padding (an attention_mask of 0) is not counted
    method  one of rounding/methods.py
    """
    with steady(model):
        _feedback(model, twins, calls, effort, progress, method)


def _feedback(
    model: nn.Module,
    twins: Mapping[str, Twin],
    calls: Sequence[Call],
    effort: Effort,
    progress: Progress | None,
    method: str,
) -> None:
    tell = progress or (lambda done, total, what: None)
    pairs = pairs_of(model, calls[0]) if effort.rescale and method in FLOORS else []
    chain = chain_of(model, calls[0])
    blocks = [] if chain is None else list(chain)
    inside = [{name: each for name, each in twins.items() if _within(block, each)} for block in blocks]
    rest = {name: each for name, each in twins.items() if not any(name in one for one in inside)}
    total = len(blocks) + 1
    counted = [call.counted for call in calls]
    known: dict[str, Tensor] = {}
    if method in FISHER:
        asking = {name: each for one in inside for name, each in one.items()} if blocks else rest
        asking = {name: each for name, each in asking.items() if not isinstance(each, QEmbedding)}
        known = fisher(model, asking, calls, tell)
    with unrounded(model):
        if blocks:
            assert chain is not None
            states = states_of(model, chain, calls)
            for k, (block, own) in enumerate(zip(blocks, inside, strict=True)):
                tell(k, total, f"block {k}")
                there = [pair for pair in pairs if _within(block, pair.norm)]
                _round(own, there, partial(states.run, block), counted, effort, method, known)
                states.advance(block)
            states.calls.clear()
        tell(total - 1, total, "head")

        def everything(n: int) -> None:
            calls[n](model)

        outside = [pair for pair in pairs if not any(_within(block, pair.norm) for block in blocks)]
        _round(rest, outside, everything, counted, effort, method, known)
    tell(total, total, "done")


def _round(
    own: Mapping[str, Twin],
    pairs: Sequence[Pair],
    run: Callable[[int], None],
    counted: Sequence[Tensor | None],
    effort: Effort,
    method: str,
    known: dict[str, Tensor],
) -> None:
    """See what arrives at some twins, rescale columns, round all and see them rounded from now on.

    run      makes a call by its number
    counted  of every call, which positions are no padding
    known    Fisher information by name, which is taken out
    """
    seen = _Seen()
    products = {name: each for name, each in own.items() if not isinstance(each, QEmbedding)}
    with torch.no_grad(), hooked(products, seen), coarse_products():
        for n, some in enumerate(counted):
            seen.counted = some
            run(n)
    moments = _backed({name: seen.moments.get(name) for name in products}, own)
    curves: dict[int, Curvature] = {}

    def curve(name: str) -> Curvature:
        key = id(moments[name])
        if key not in curves:
            curves[key] = curvature(moments[name].H, effort.damping)
        return curves[key]

    for pair in pairs:
        names = [name for name, each in own.items() if any(each is one for one in pair.consumers)]
        if len(names) != len(pair.consumers) or not all(name in moments for name in names):
            continue  # not all of them are to be rounded
        if not all(adapts(own[name].grid) for name in names):
            continue
        samples = sampled((own[name].matrix.detach().float(), cast(Adaptive, own[name].grid)) for name in names)
        c = curve(names[0])
        t = column_factors(samples, c, torch.arange(c.H.shape[0]))
        if t is not None:
            fold(pair, t)
            rescaled = c.rescaled(t, effort.damping)
            for name in names:
                curves[id(moments[name])] = rescaled
                if name in known:  # gradients are divided by what weights grow by
                    known[name] = known[name] / t.square()
    pieces = [
        _Piece(name, each, rows, curve(name) if name in moments else None, F, method, effort)
        for name, each in _once(own).items()
        for rows, F in _parts(each, known.pop(name, None))
    ]
    found = iter(spread(_one, pieces, lambda piece: piece.cost))
    parts: dict[str, list[dict[str, Tensor]]] = {}
    for piece in pieces:
        parts.setdefault(piece.name, []).append(next(found))
    for name, several in parts.items():
        twin = own[name]
        together = {key: torch.cat([part[key] for part in several]) for key in several[0]}
        rows, cols = twin.matrix.shape
        codes = together.pop("codes")
        twin.fix(QuantizedTensor(twin.grid, (rows, cols), codes, together))
    for name, twin in own.items():
        if name not in parts:  # tied to one that was rounded: the same parameter, the same grid
            twin.fix_as(next(own[each] for each in parts if own[each].tied_to(twin)))
        twin.active = True


def _backed(moments: Mapping[str, Moments | None], own: Mapping[str, Twin]) -> dict[str, Moments]:
    """Those that something is known of; thin ones of experts are backed by the other experts of the layer."""
    stacks: dict[str, list[str]] = {}
    for name in moments:
        if isinstance(own[name], QExpert):
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
    found = dict(moments)
    for names in stacks.values():
        found |= zip(names, pooled([moments[name] for name in names]), strict=True)
    return {name: each for name, each in found.items() if each is not None and not each.is_empty}


def _once(own: Mapping[str, Twin]) -> dict[str, Twin]:
    """Of tied twins the one that multiplies."""
    ordered = sorted(own.items(), key=lambda each: isinstance(each[1], QEmbedding))
    seen: dict[int, str] = {}
    for name, each in ordered:
        seen.setdefault(id(each._parameters["weight"]), name)
    return {name: own[name] for name in own if name in seen.values()}


@dataclass(frozen=True)
class _Piece:
    """Some rows of a matrix, what is known of their inputs, and of what each weight does to the predictions."""

    name: str
    twin: Twin
    W: Tensor
    c: Curvature | None
    F: Tensor | None
    method: str
    effort: Effort

    @property
    def cost(self) -> float:
        rows, cols = self.W.shape
        return cols * (500.0 + rows * (1 + cols / 2000))


def _one(piece: _Piece) -> dict[str, Tensor]:
    grid = piece.twin.grid
    if piece.c is None or not adapts(grid):  # others are searched with the weight of every column
        importance = None if piece.c is None else piece.c.H.diagonal()
        found = search(piece.W, grid, importance)
    else:
        F = None if piece.F is None else piece.F.float()
        best, _ = rounded(piece.method, piece.W, cast(Adaptive, grid), piece.c, piece.effort, F)
        found = best.quantized
    return {**found.params, "codes": found.codes}


def _parts(twin: Twin, F: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows that can be rounded without the others, and their Fisher information where it is known."""
    W = twin.matrix.detach().float()
    size = ROWS if twin.grid.row_independent else len(W)
    return zip(W.split(size), repeat(None) if F is None else F.split(size), strict=False)


class _Seen:
    """Moments of what arrives at modules; those that are given the very same tensor share them.

    counted  [windows, length] of the present call, as `Call.counted` says
    """

    def __init__(self) -> None:
        self.counted: Tensor | None = None
        self.moments: dict[str, Moments] = {}
        self._last: list[tuple[Tensor, Moments]] = []

    def __call__(self, name: str, x: Tensor) -> None:
        shared = next((moments for other, moments in self._last if other is x), None)
        if shared is not None:
            self.moments.setdefault(name, shared)
            return
        moments = self.moments.setdefault(name, Moments(x.shape[-1]))
        moments.add(positions(x.detach(), self.counted))
        moments.settle()
        self._last = [*self._last[-3:], (x, moments)]  # q, k and v come one after the other


def _within(block: nn.Module, module: nn.Module) -> bool:
    return any(each is module for each in block.modules())
