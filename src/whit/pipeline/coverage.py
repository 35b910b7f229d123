"""Which experts of a mixture saw little of the calibration text.

The router decides what an expert sees. One that saw few tokens is rounded for the mean of its layer as much as for its
own (calibration/moments.py); one that saw none, for the mean alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from whit.calibration.moments import THIN, UNSEEN
from whit.pipeline.effort import TensorLoss


@dataclass(frozen=True)
class Coverage:
    """One expert.

    n_tokens  calibration tokens that came to it
    thin      whether those are too few for moments of its own
    """

    block: int
    expert: int
    n_tokens: int
    thin: bool


def numbered(losses: Sequence[TensorLoss]) -> Iterator[tuple[TensorLoss, int | None]]:
    """Every loss with the number of its expert, None for a tensor of one matrix."""
    count: dict[str, int] = {}
    for each in losses:
        count[each.name] = count.get(each.name, 0) + 1
    seen: dict[str, int] = {}
    for each in losses:
        k = seen[each.name] = seen.get(each.name, -1) + 1
        yield each, k if count[each.name] > 1 else None


def coverage(losses: Sequence[TensorLoss]) -> list[Coverage]:
    """Every expert once, in order; an expert's matrices see the same tokens, the widest of them needs most."""
    found: dict[tuple[int, int], Coverage] = {}
    for each, expert in numbered(losses):
        block = re.match(r"blk\.(\d+)\.", each.name)
        if expert is not None and block is not None:
            key = int(block[1]), expert
            thin = each.note.startswith((THIN, UNSEEN)) or (key in found and found[key].thin)
            found[key] = Coverage(*key, each.n_tokens, thin)
    return list(found.values())
