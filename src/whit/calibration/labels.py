"""Labels that a model draws from its own predictions: squared gradients of their likelihood are Fisher information.

Files and live models draw alike, so that both find the same: the same windows, taken together in the same batches, a
generator for each, and as many tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LOGITS = 1 << 24  # values in one piece of logits
MOST, BATCH = 32, 8  # windows that are read, and of one generator
STORED = torch.bfloat16  # of Fisher information: two bytes per weight of the model; only ratios within a row matter


def batches(n: int) -> list[list[int]]:
    """Which of n windows are read: all, or MOST of them evenly spread; BATCH at a time."""
    chosen = torch.linspace(0, n - 1, min(MOST, n)).round().long()
    return [each.tolist() for each in chosen.split(BATCH)]


def pieces(length: int, n_vocab: int) -> Iterator[slice]:
    """Parts of a window whose logits may be in memory together."""
    size = max(1, LOGITS // n_vocab)
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def towards(p: Tensor, generator: torch.Generator) -> Tensor:
    """d log p(y) / d logits of labels y drawn from p [tokens, vocabulary], which is overwritten."""
    label = torch.multinomial(p, 1, generator=generator)
    return p.neg_().scatter_add_(1, label, torch.ones_like(label, dtype=p.dtype))
