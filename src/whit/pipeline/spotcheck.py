"""What the sensitivity sweep predicts, measured: one tensor at a time on one grid, by plain rounding."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from whit.allocator import return_memory
from whit.grids.named import grid_named
from whit.models.links import Links
from whit.models.model import Model
from whit.models.stream import BlockStream, pieces
from whit.pipeline.quantize import model_view
from whit.rounding.nearest import nearest

Progress = Callable[[int, int, str], None]
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def measured(model: Model, pairs: Sequence[tuple[str, str]], windows: Tensor, progress: Progress) -> list[float]:
    """Mean KL divergence, nats per token, of the original with one tensor on a grid.

    pairs    (tensor, grid)
    windows  [n, length] int64
    """
    view = model_view(model)
    links, tensors = Links(view), {tensor.name: tensor for tensor in view.tensors}
    stream = BlockStream(model, links.read)
    total = len(pairs) + 1
    progress(0, total, "the original")
    reached = [stream.start(windows)]
    for index in range(stream.n_blocks):
        reached.append(_through(stream, index, reached[-1]))
    head_name = HEAD if HEAD in tensors else EMBEDDING
    original, found = tensors[head_name].read(), []
    for done, (name, grid) in enumerate(pairs):
        progress(done + 1, total, f"{name} on {grid}")
        W = tensors[name].read()
        Q = nearest(W.reshape(-1, W.shape[-1]), grid_named(grid)).dequantize().reshape(W.shape)
        links.replace(name, Q)
        number = re.match(r"blk\.(\d+)\.", name)
        first = int(number[1]) if number else 0 if name == EMBEDDING else stream.n_blocks
        hidden = stream.start(windows) if name == EMBEDDING else reached[first]
        for index in range(first, stream.n_blocks):
            hidden = _through(stream, index, hidden)
        links.restore()
        found.append(_divergence(stream, hidden, Q if name == head_name else original, reached[-1], original))
        return_memory()
    return found


def _through(stream: BlockStream, index: int, hidden: list[Tensor]) -> list[Tensor]:
    stream.fill(index)
    out = [stream.run(index, window) for window in hidden]
    stream.empty(index)
    return out


def _divergence(
    stream: BlockStream, after: list[Tensor], head: Tensor, before: list[Tensor], original: Tensor
) -> float:
    total, n = 0.0, 0
    with torch.no_grad():
        for now, then in zip(after, before, strict=True):
            for part in pieces(now.shape[1], head.shape[0]):
                log_p = stream.logits(then[:, part], original).log_softmax(-1)
                log_q = stream.logits(now[:, part], head).log_softmax(-1)
                total += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
                n += log_p.shape[0]
    return total / n
