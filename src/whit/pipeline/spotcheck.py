"""What one changed tensor does to the predictions, measured: the original with that tensor alone replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from whit.allocator import return_memory
from whit.calibration.labels import pieces
from whit.devices import CPU
from whit.grids.named import grid_named
from whit.models.links import Links
from whit.models.model import Model
from whit.models.stream import BlockStream, Weights
from whit.pipeline.quantize import model_view
from whit.rounding.nearest import nearest

Progress = Callable[[int, int, str], None]
Changed = Callable[[Tensor], Tensor]  # a tensor of the original, float32 -> what stands in its place
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def measured(
    model: Model, pairs: Sequence[tuple[str, str]], windows: Tensor, progress: Progress, device: torch.device = CPU
) -> list[float]:
    """Mean KL divergence, nats per token, of the original with one tensor on a grid, by plain rounding.

    pairs    (tensor, grid)
    windows  [n, length] int64
    device   where the model runs
    """

    def on(grid: str) -> Changed:
        return lambda W: nearest(W.reshape(-1, W.shape[-1]), grid_named(grid)).dequantize().reshape(W.shape)

    return changed(model, [(name, on(grid)) for name, grid in pairs], windows, progress, device=device)


def changed(
    model: Model,
    changes: Sequence[tuple[str, Changed]],
    windows: Tensor,
    progress: Progress,
    start: int = 0,
    device: torch.device = CPU,
) -> list[float]:
    """Mean KL divergence, nats per token, of the original with one tensor replaced, for every change.

    changes  (tensor, what becomes of it)
    windows  [n, length] int64
    start    the first position of a window that counts
    device   where the model runs
    """
    view = model_view(model)
    links, tensors = Links(view), {tensor.name: tensor for tensor in view.tensors}
    stream = BlockStream(model, links.read, device)
    total = len(changes) + 1
    progress(0, total, "the original")
    reached = [stream.start(windows)]
    for index in range(stream.n_blocks):
        reached.append(_through(stream, index, reached[-1]))
    head_name = HEAD if HEAD in tensors else EMBEDDING
    original, outer, found = tensors[head_name].read(), stream.outer(), []
    for done, (name, change) in enumerate(changes):
        progress(done + 1, total, name)
        Q = change(tensors[name].read())
        links.replace(name, Q)
        number = re.match(r"blk\.(\d+)\.", name)
        after = {slot: links.read(slot, outer[slot]) for slot, _ in links.slots(name) if slot in outer}
        outside = number is None and name != head_name and not after  # embeddings of tokens or positions
        first = int(number[1]) if number else stream.n_blocks
        if outside or name == EMBEDDING:
            first, hidden = 0, stream.start(windows)
        else:
            hidden = reached[first]
        for index in range(first, stream.n_blocks):
            hidden = _through(stream, index, hidden)
        links.restore()
        head = Q if name == head_name else original
        found.append(_divergence(stream, hidden, head, after, reached[-1], original, start))
        return_memory()
    return found


def _through(stream: BlockStream, index: int, hidden: list[Tensor]) -> list[Tensor]:
    stream.fill(index)
    out = [stream.run(index, window) for window in hidden]
    stream.empty(index)
    return out


def _divergence(
    stream: BlockStream,
    after: list[Tensor],
    head: Tensor,
    weights: Weights,
    before: list[Tensor],
    original: Tensor,
    start: int,
) -> float:
    """weights  parameters between the blocks and the head that are changed"""
    total, n = 0.0, 0
    with torch.no_grad():
        for now, then in zip(after, before, strict=True):
            for part in pieces(now.shape[1] - start, head.shape[0]):
                here = slice(part.start + start, part.stop + start)
                log_p = stream.logits(then[:, here], original).log_softmax(-1)
                log_q = stream.logits(now[:, here], head, weights).log_softmax(-1)
                total += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
                n += log_p.shape[0]
    return total / n
