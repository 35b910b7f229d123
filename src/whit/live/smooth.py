"""SmoothQuant on a live model: what sticks out of a norm's outputs moves into the layers that they go to.

Factors are those of transforms/smooth.py, from some tokens of every call; a norm whose outputs are even enough already
keeps its own. Source: arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from whit.live.fold import Pair, fold, pairs_of
from whit.live.run import Call, hooked
from whit.transforms.awq import Sample
from whit.transforms.smooth import smooth_factors

TOKENS = 32  # of every call that factors are chosen by
ROWS = 256  # of every consumer


def smooth(model: nn.Module, calls: Sequence[Call]) -> int:
    """Fold factors into norms and the unfrozen layers after them; returns how many norms were changed."""
    pairs = {pair.name: pair for pair in pairs_of(model, calls[0])}
    tokens: dict[str, list[Tensor]] = {name: [] for name in pairs}
    squares = {name: torch.zeros(0) for name in pairs}
    count = dict.fromkeys(pairs, 0)

    def seen(name: str, y: Tensor) -> None:
        x = y.detach().float().flatten(0, -2)
        some = torch.linspace(0, x.shape[0] - 1, min(TOKENS, x.shape[0])).round().long()
        tokens[name].append(x[some])
        total = x.square().sum(0)
        squares[name] = total if not count[name] else squares[name] + total
        count[name] += x.shape[0]

    with torch.no_grad(), hooked({name: pair.norm for name, pair in pairs.items()}, seen, outputs=True):
        for call in calls:
            call(model)
    changed = 0
    for name, pair in pairs.items():
        kept = torch.cat(tokens[name])
        channel = torch.arange(kept.shape[1])
        t = smooth_factors(_samples(pair), kept, squares[name] / count[name], channel)
        if t is not None:
            fold(pair, t)
            changed += 1
    return changed


def _samples(pair: Pair) -> list[Sample]:
    found = []
    for twin in pair.consumers:
        W = twin.matrix.detach().float()
        rows = torch.linspace(0, W.shape[0] - 1, min(ROWS, W.shape[0])).round().long()
        weight = torch.full((len(rows),), W.shape[0] / len(rows))
        found.append(Sample(W[rows], twin.grid, weight))  # type: ignore[arg-type]
    return found
