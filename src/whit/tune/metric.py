"""What an error in a hidden state does to the model's predictions, as a metric on hidden states.

    M = mean over tokens of g g^T,   g = d log p(y) / d hidden state,   y drawn from the model itself

1/2 d^T M d is, on average over tokens, the divergence of the predictions that an error d causes, to second order: M is
the Fisher information of the hidden state. Directions that later blocks do not read count for little in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whit.tune.halves import PIECE, Halves, fast

MOST = 32  # windows that are read


def metrics(halves: Halves, blocks: Sequence[nn.Module], ids: Tensor, seed: int = 0) -> list[Tensor]:
    """[width, width] float32 behind every block, scaled to a mean of 1 on the diagonal.

    halves  of a float model
    blocks  of that model, each handed what the one before returns
    ids     [windows, length] int64; of more than MOST as many, evenly spread
    seed    of the tokens that are drawn
    """
    ids = ids[torch.linspace(0, len(ids) - 1, min(MOST, len(ids))).round().long()]
    drawn = torch.Generator(ids.device).manual_seed(seed)
    sums: dict[int, Tensor] = {}
    begun: list[Tensor] = []
    hooks = [block.register_forward_hook(_tap(n, sums, begun)) for n, block in enumerate(blocks)]
    try:
        for window in ids:
            with torch.enable_grad(), fast(ids.device):
                hidden = halves.hidden(window[None])
                torch.autograd.grad(hidden, begun, _gradient(halves, hidden.detach(), drawn))
            begun.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return [sums[n] / sums[n].diagonal().mean() for n in range(len(blocks))]


def _gradient(halves: Halves, hidden: Tensor, drawn: torch.Generator) -> Tensor:
    """Of the sum over tokens of -log p(y), by final hidden states [tokens, width]."""
    G = torch.zeros_like(hidden)
    for at in range(0, len(hidden), PIECE):
        rows = hidden[at : at + PIECE].requires_grad_()
        logits = halves.logits(rows)
        off = logits.detach().float().softmax(-1)
        y = torch.multinomial(off, 1, generator=drawn)
        off.scatter_add_(1, y, torch.full_like(y, -1.0, dtype=off.dtype))
        G[at : at + PIECE] = torch.autograd.grad(logits, rows, off.to(logits.dtype))[0]
    return G


def _tap(n: int, sums: dict[int, Tensor], begun: list[Tensor]) -> Any:
    """A hook that adds up what comes back to the output of block n; the first one's output begins what is derived by.

    sums   block -> sum over tokens of g g^T
    begun  gets that output
    """

    def add(G: Tensor) -> None:
        with torch.autocast(G.device.type, enabled=False):
            G = G.float().flatten(0, 1)
            sums[n] = sums.get(n, 0) + G.T @ G

    def hook(block: nn.Module, args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        if n == 0:
            hidden = hidden.detach().requires_grad_()
            begun.append(hidden)
        hidden.register_hook(add)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    return hook
