"""What arrives at the matrices of the original model: one walk over its blocks, in which nothing is rounded.

It gives an importance matrix, or the whole moments, for files that are all rounded for the same (statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from whit.allocator import keep_large_apart, return_memory
from whit.calibration.moments import Moments
from whit.checkpoints.imatrix import ImportanceMatrix
from whit.devices import CPU
from whit.models.architecture import GGUFView
from whit.models.links import Links
from whit.models.model import Model
from whit.models.stream import BlockStream
from whit.models.taps import watched
from whit.pipeline.folding import pairs_of, sound_pairs
from whit.pipeline.inputs import Inputs, moments_of
from whit.pipeline.plan import Step
from whit.pipeline.statistics import Statistics
from whit.products import coarse_products

Progress = Callable[[int, int, str], None]
KEPT = 32  # tokens of every window that smoothing looks at
HEADS = ("output.weight", "token_embd.weight")


def importance_matrix(
    model: Model,
    view: GGUFView,
    windows: Tensor,
    source: str,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> ImportanceMatrix:
    """The mean squared inputs of every matrix of the original model, head included, on calibration windows.

    view     the model's tensors as a GGUF file names them
    windows  [n, length] int64
    source   what the text is
    device   where the model runs
    """
    links, tell = Links(view), progress or (lambda done, total, what: None)
    stream = BlockStream(model, links.read, device)
    hidden, total = stream.start(windows), stream.n_blocks + 1
    found = _Importance(view, links)
    for index in range(stream.n_blocks):
        tell(index, total, f"block {index}")
        found.note_block(stream.prefix(index), _observed(stream, index, hidden))
    tell(total - 1, total, "head")
    found.note_head(final_moments(stream, hidden))
    tell(total, total, "done")
    return ImportanceMatrix(found.means, found.counts, len(windows), windows.shape[1], (source,))


def importance_of(
    model: Model, view: GGUFView, statistics: Statistics, windows: Tensor, source: str
) -> ImportanceMatrix:
    """The same from statistics that are complete, which were gathered on the windows. Raises BrokenFileError."""
    links = Links(view)
    found, stream = _Importance(view, links), BlockStream(model, links.read)
    for index in range(stream.n_blocks):
        prefix = stream.prefix(index)
        found.note_block(prefix, statistics.inputs(index, prefix))
    found.note_head(statistics.head())
    return ImportanceMatrix(found.means, found.counts, len(windows), windows.shape[1], (source,))


def gather_statistics(
    model: Model,
    view: GGUFView,
    steps: tuple[Step, ...],
    windows: Tensor,
    statistics: Statistics,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> None:
    """Fill `statistics` with the moments of the original model; those of an earlier call are gone on from.

    view     the model's tensors as a GGUF file names them
    steps    of any plan for them, by which their values are read
    windows  [n, length] int64
    device   where the model runs
    Raises BadWeightsError for weights that are not finite, OutputError when they cannot be kept.
    """
    if statistics.complete:
        return
    keep_large_apart()
    links, tell, named = Links(view), progress or (lambda done, total, what: None), {s.tensor.name: s for s in steps}
    stream, first, sound = BlockStream(model, links.read, device), statistics.n_blocks, set[str]()
    total, hidden = stream.n_blocks + 1, stream.start(windows)
    stream.fill(0)
    stream.fuse_attention(hidden[0])  # decided on the first block, for all
    if first == 0:
        of_block = {name: named[name] for name in links.gguf_names(stream.prefix(0))}
        sound = sound_pairs(stream, links, *pairs_of(view, 0, of_block), of_block, hidden[0])
    else:
        hidden, sound = statistics.hidden(), set(statistics.sound)
    stream.empty(0)
    for index in range(first, stream.n_blocks):
        tell(index, total, f"block {index}")
        with coarse_products():
            inputs = _observed(stream, index, hidden, KEPT)
        statistics.keep(inputs, sorted(sound), hidden)
        return_memory()
    tell(total - 1, total, "head")
    with coarse_products():
        statistics.keep_head(final_moments(stream, hidden))
    tell(total, total, "done")


class _Importance:
    """Mean squared inputs, matrix by matrix."""

    def __init__(self, view: GGUFView, links: Links) -> None:
        self.means: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self._links, matrices = links, (each for each in view.tensors if len(each.shape) > 1 and not each.keep_float)
        self._shapes = {tensor.name: tensor.shape for tensor in matrices}

    def note_block(self, prefix: str, inputs: Inputs) -> None:
        for name in self._links.gguf_names(prefix):
            if name in self._shapes:
                self._note(name, moments_of(self._shapes[name], inputs, self._links.slots(name)))

    def note_head(self, moments: Moments) -> None:
        self._note(next(name for name in HEADS if name in self._shapes), [moments])

    def _note(self, name: str, seen: list[Moments | None]) -> None:
        cols = self._shapes[name][-1]
        self.means[name] = torch.stack([torch.ones(cols) if each is None else each.importance for each in seen])
        self.counts[name] = torch.tensor([0 if each is None else each.n_tokens for each in seen])


def _observed(stream: BlockStream, index: int, hidden: list[Tensor], kept: int = 0) -> Inputs:
    """What arrives in a block while it moves the windows on; kept: tokens of every window to keep as they are."""
    inputs, block = Inputs(stream.prefix(index), kept), stream.fill(index)
    for n, window in enumerate(hidden):
        with watched(block, inputs.see):
            hidden[n] = stream.run(index, window)
        inputs.forget()
    stream.empty(index)
    return inputs


def final_moments(stream: BlockStream, hidden: list[Tensor]) -> Moments:
    """The moments of what the head is given."""
    moments: Moments | None = None
    for window in hidden:
        final = stream.final(window)
        moments = moments or Moments(final.shape[1])
        moments.add(final)
        moments.settle()
    assert moments is not None  # there is at least one window
    return moments
