"""The main loop: a stream of blocks, each rounded for the inputs that it will really get.

    for every block: fill it, gather the moments of its inputs on the quantized prefix, round its matrices,
                     put the rounded ones in, run it to make the next block's inputs, empty it

Beside the hidden states of the quantized prefix run those of the original model when the target is to make up for
earlier errors. The head comes last; when it is the embedding, that one matrix is rounded for its role as the head,
in which every error reaches the logits, and the blocks before it have run on the original embedding.

With statistics of the original model, gathered before (statistics.py), nothing is run: matrices are rounded for these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from whit.allocator import keep_large_apart, return_memory
from whit.calibration.moments import Moments
from whit.grids.quantized import QuantizedTensor
from whit.models.activations import fixed_scale
from whit.models.architecture import GGUFView
from whit.models.links import Links
from whit.models.model import Model
from whit.models.stream import BlockStream
from whit.models.taps import watched
from whit.pipeline.effort import Calibration
from whit.pipeline.fisher import fisher
from whit.pipeline.folding import Folded, folded, pairs_of, sound_pairs
from whit.pipeline.inputs import SHARES, Inputs, moments_of, shares_of, windows_of
from whit.pipeline.observe import HEADS, KEPT
from whit.pipeline.plain import plain_pieces
from whit.pipeline.plan import Piece, Rounded, Step
from whit.pipeline.rounder import Rounder, Task
from whit.pipeline.state import Block, State
from whit.pipeline.statistics import Statistics
from whit.pipeline.windows import Spilled, Windows
from whit.products import coarse_products
from whit.recipes.folders import FIXED, SMOOTHED
from whit.transforms.absorb import head_pair

Progress = Callable[[int, int, str], None]
WINDOW = "window"
HEAD = ("head", None)  # what arrives there, among what arrives at weights


class CalibratedRun:
    """One pass over a model.

    rounder       holds what every tensor lost, filled while `tensors` is consumed
    input_scales  fixed scales of what arrives at tensors, where there are to be some; filled likewise
    """

    def __init__(
        self,
        model: Model,
        view: GGUFView,
        steps: tuple[Step, ...],
        calibration: Calibration,
        progress: Progress | None,
        activations: str = "",
        state: State | None = None,
    ) -> None:
        """For one model.

        view         its tensors as the file will name them
        steps        one per tensor of the file
        activations  how runtimes will quantize what arrives at layers, as in a recipe
        state        where finished blocks are kept, and those of an earlier run are; None to keep nothing, and on all
                     ranks but the first
        """
        self._smooth, self._fixed = activations in SMOOTHED, activations in FIXED
        self._kind = "int" if self._smooth else "float"
        self._state = state
        self._kept = KEPT if self._smooth or self._fixed else 0
        self.input_scales: dict[str, float] = {}
        self._model, self._fisher = model, dict[str, Tensor]()  # of tensors that are still to be rounded
        self._steps = {step.tensor.name: step for step in steps}
        self._view, self._links, self._calibration = view, Links(view), calibration
        self._stream = BlockStream(model, self._links.read, calibration.device)
        self._tell = progress or (lambda done, total, what: None)
        self._sound: set[str] = set()  # the first producers of pairs that may be folded
        self._ranks = calibration.ranks
        self._n = len(calibration.windows)
        self._shares = shares_of(self._n, self._ranks.part(SHARES))
        self.rounder = Rounder(calibration.effort, calibration.strength, self._ranks)

    def tensors(self) -> Iterator[Rounded]:
        """Every tensor, in the order of computation.

        Raises BadWeightsError for weights or activations that are not finite, and what `State` raises.
        """
        keep_large_apart()
        if asking := [name for name, step in self._steps.items() if step.needs_fisher]:
            self._fisher = self._fisher_of(asking)
        if self._calibration.statistics is not None:
            yield from self._known(self._calibration.statistics)
            return
        total = self._stream.n_blocks + 1
        self._tell(0, total, "embeddings")
        mine = [n for share in self._shares for n in share]
        hidden, original = self._store(), self._store()
        self._stream.start(self._calibration.windows[mine or [0]], hidden.append)  # masks are written down in any case
        if not mine:
            hidden.clear()
        if self._calibration.strength > 0:
            for n in range(len(hidden)):
                original.append(hidden[n])
        first = self._ranks.said(self._state.n_blocks if self._state else 0)
        if first:
            self._stream.fill(0)
            self._fuse_attention(hidden)
            self._stream.empty(0)
            self._deal(hidden, original)
            for index in range(first):
                yield from self._again(self._state, index)
            self._sound = set(self._ranks.said(sorted(self._sound)))
        for index in range(first, self._stream.n_blocks):
            self._tell(index, total, f"block {index}")
            yield from self._block(index, hidden, original)
        self._tell(total - 1, total, "head")
        original.clear()
        with coarse_products():
            moments = self._final(hidden) if self._asks_at_head() else None
        hidden.clear()  # the head is the largest matrix: room for it
        return_memory()
        yield from self._ends(moments)
        self._tell(total, total, "done")

    def _known(self, statistics: Statistics) -> Iterator[Rounded]:
        """Every tensor, rounded for moments that are known: nothing is run."""
        self._sound, total = set(statistics.sound), self._stream.n_blocks + 1
        for index in range(self._stream.n_blocks):
            self._tell(index, total, f"block {index}")
            self.rounder.forget()
            prefix = self._stream.prefix(index)
            steps = {name: self._steps.pop(name) for name in self._links.gguf_names(prefix)}
            yield from self._rounded(self._tasks(index, steps, statistics.inputs(index, prefix)))
            return_memory()
        self._tell(total - 1, total, "head")
        yield from self._ends(statistics.head() if self._asks_at_head() else None)
        self._tell(total, total, "done")

    def _fisher_of(self, asking: list[str]) -> dict[str, Tensor]:
        found, windows = self._state.fisher() if self._state else None, self._calibration.windows
        if self._ranks.said(found is not None):
            return self._ranks.given(found)
        found = fisher(
            self._model, asking, windows, progress=self._tell, ranks=self._ranks, device=self._calibration.device
        )
        if self._state:
            self._state.keep_fisher(found)
        return found

    def _store(self) -> Windows:
        """Where windows go."""
        return [] if self._calibration.spill is None else Spilled(self._calibration.spill)

    def _fuse_attention(self, hidden: Windows) -> None:
        """Decided on the first block and window, for all."""
        first = self._ranks.rank == 0
        if self._ranks.said(first and self._stream.fuse_attention(hidden[0])) and not first:
            self._stream.use_fused_attention()

    def _deal(self, hidden: Windows, original: Windows) -> None:
        """Put what the first unfinished block is given in place of what the first was: of all windows, which the first
        rank has kept, to each its own.
        """
        ranks, own = self._ranks, windows_of(self._n, self._ranks, self._ranks.rank)
        kept = self._store(), self._store()
        if self._state:
            self._state.hidden(*kept)
        for windows, mine in zip(kept, (hidden, original), strict=True):
            mine.clear()
            for n in range(ranks.said(len(windows))):
                window = ranks.given({WINDOW: windows[n]} if len(windows) else None)[WINDOW]
                if n in own:
                    mine.append(window)

    def _collected(self, own: Windows) -> Windows:
        """The windows of all ranks, on the first."""
        ranks = self._ranks
        if ranks.size == 1:
            return own
        windows = self._store()
        for by in range(ranks.size):
            for n in range(ranks.said(len(own), by)):
                window = ranks.given({WINDOW: own[n]} if by == ranks.rank else None, by)[WINDOW]
                if ranks.rank == 0:
                    windows.append(window)
        return windows

    def _again(self, state: State | None, index: int) -> Iterator[Rounded]:
        """The tensors of a block that an earlier run finished; on ranks without a state they are only passed over."""
        if state is None:
            for name in self._links.gguf_names(self._stream.prefix(index)):
                self._fisher.pop(name, None)
                del self._steps[name]
            return
        block = state.block(index, self._steps)
        self._sound = set(block.sound)
        self.rounder.losses += block.losses
        self.input_scales |= block.input_scales
        for name, pieces in block.pieces.items():
            self._fisher.pop(name, None)
            yield self._steps.pop(name), iter(pieces)

    def _block(self, index: int, hidden: Windows, original: Windows) -> Iterator[Rounded]:
        stream, links, prefix = self._stream, self._links, self._stream.prefix(index)
        block = stream.fill(index)
        if index == 0:
            self._fuse_attention(hidden)
        inputs = Inputs(prefix, self._kept, self._ranks)
        with coarse_products():
            for n in self._windows(inputs):
                if len(original):
                    with watched(block, inputs.remember):
                        original[n] = stream.run(index, original[n])
                with watched(block, inputs.see):
                    stream.run(index, hidden[n])
                inputs.forget()
        inputs.join()
        self.rounder.forget()
        return_memory()
        steps = {name: self._steps.pop(name) for name in links.gguf_names(prefix)}
        if index == 0 and self._calibration.effort.rescale:  # later blocks are built like it
            pairs, first = pairs_of(self._view, index, steps), self._ranks.rank == 0
            sound = sound_pairs(stream, links, *pairs, steps, hidden[0]) if first else set[str]()
            self._sound = set(self._ranks.said(sorted(sound)))
        tasks = self._tasks(index, steps, inputs)
        n_losses, made = len(self.rounder.losses), dict[str, list[Piece]]()
        for step, pieces in self._rounded(tasks, install=True):
            yield step, _noted(pieces, made.setdefault(step.tensor.name, [])) if self._state else pieces
        stream.fill(index)
        with coarse_products():
            for n in range(len(hidden)):
                hidden[n] = stream.run(index, hidden[n])
        stream.empty(index)
        links.restore()
        windows, originals = self._collected(hidden), self._collected(original)
        if self._state:
            scales = {name: self.input_scales[name] for name in steps if name in self.input_scales}
            finished = Block(made, self.rounder.losses[n_losses:], scales, sorted(self._sound))
            self._state.keep(finished, windows, originals)
            made.clear()
        return_memory()

    def _windows(self, inputs: Inputs) -> Iterator[int]:
        """The places of this rank's windows, share by share."""
        place = 0
        for share in self._shares:
            yield from range(place, place := place + len(share))
            inputs.turn()

    def _tasks(self, index: int, steps: dict[str, Step], inputs: Inputs) -> list[Task]:
        """A block's tensors with what arrives at them, columns rescaled."""
        change, links, tasks = self._folded(index, steps, inputs), self._links, []
        for name in steps:
            step = change.steps.get(name, steps[name])
            self._fix_inputs(step, inputs.of(links.slots(name)[0]), change.columns.get(name))
            seen, factors = moments_of(step.tensor.shape, inputs, links.slots(name)), change.columns.get(name)
            tasks.append(Task(step, seen, factors, self._fisher.pop(name, None)))
        return tasks

    def _asks_at_head(self) -> bool:
        """Whether what the head is given makes a difference."""
        return next(self._steps[name] for name in HEADS if name in self._steps).needs_moments

    def _ends(self, moments: Moments | None) -> Iterator[Rounded]:
        """What is left: embeddings, final norm, head. moments: of what the head is given."""
        head = next(name for name in HEADS if name in self._steps)
        self.rounder.forget()
        change, pair = Folded({}, {}), head_pair({name: step.tensor.shape for name, step in self._steps.items()})
        if pair and self._calibration.effort.rescale:
            change = folded([pair], self._steps, lambda name: moments, self.rounder)
        tasks = []
        for name in list(self._steps):
            step = self._steps.pop(name)
            seen = [moments if name == head else None]
            tasks.append(Task(change.steps.get(name, step), seen, change.columns.get(name)))
        yield from self._rounded(tasks)

    def _final(self, hidden: Windows) -> Moments | None:
        """The moments of what the head is given."""
        inputs = Inputs("", 0, self._ranks)
        for n in self._windows(inputs):
            inputs.see(HEAD, self._stream.final(hidden[n]))
            inputs.forget()
        inputs.join()
        return inputs.of(HEAD)

    def _folded(self, index: int, steps: dict[str, Step], inputs: Inputs) -> Folded:
        """Factors for the block's columns."""
        if not self._calibration.effort.rescale:
            return Folded({}, {})
        prefix, pairs = pairs_of(self._view, index, steps)
        links, sound = self._links, [pair for pair in pairs if pair.producers[0].removeprefix(prefix) in self._sound]
        return folded(sound, steps, lambda name: inputs.of(links.slots(name)[0]), self.rounder, self._smooth)

    def _fix_inputs(self, step: Step, seen: Moments | None, factors: Tensor | None) -> None:
        if self._fixed and step.needs_moments and seen is not None and seen.tokens is not None:
            tokens = seen.tokens if factors is None else seen.tokens / factors
            self.input_scales[step.tensor.name] = fixed_scale(tokens, self._kind)

    def _rounded(self, tasks: list[Task], install: bool = False) -> Iterator[Rounded]:
        """The tensors of all tasks; decoded values go into the block."""
        matrices = self.rounder.rounded(task for task in tasks if task.step.needs_moments)
        for task in tasks:
            yield task.step, self._pieces(task, matrices, install)

    def _pieces(self, task: Task, matrices: Iterator[QuantizedTensor], install: bool) -> Iterator[Piece]:
        tensor, decoded = task.step.tensor, []
        if not task.step.needs_moments:
            if install:
                self._links.replace(tensor.name, tensor.read())
            yield from plain_pieces(task.step)
            return
        for quantized in islice(matrices, len(task.moments)):
            if install:
                decoded.append(quantized.dequantize())
            yield quantized
        if install:
            self._links.replace(tensor.name, torch.cat(decoded).reshape(tensor.shape))


def _noted(pieces: Iterator[Piece], made: list[Piece]) -> Iterator[Piece]:
    """The pieces, each also put into `made`."""
    for piece in pieces:
        made.append(piece)
        yield piece
