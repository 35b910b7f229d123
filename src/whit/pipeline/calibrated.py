"""The main loop: a stream of blocks, each rounded for the inputs that it will really get.

    for every block: fill it, gather the moments of its inputs on the quantized prefix, round its matrices,
                     put the rounded ones in, run it to make the next block's inputs, empty it

Beside the hidden states of the quantized prefix run those of the original model when the target is to make up for
earlier errors. The head comes last; when it is the embedding, that one matrix is rounded for its role as the head,
in which every error reaches the logits, and the blocks before it have run on the original embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from whit.calibration.moments import Moments, target_shift
from whit.grids.grid import Adaptive
from whit.grids.quantized import QuantizedTensor
from whit.models.architecture import GGUFView
from whit.models.links import Links
from whit.models.model import Model
from whit.models.stream import BlockStream
from whit.models.taps import Slot, watched
from whit.pipeline.effort import Calibration, TensorLoss
from whit.pipeline.plain import check_finite, plain_bytes, too_large
from whit.pipeline.plan import Step
from whit.rounding.curvature import Curvature, curvature
from whit.rounding.methods import METHODS
from whit.rounding.nearest import nearest
from whit.rounding.polish import loss

Progress = Callable[[int, int, str], None]
Written = tuple[str, Iterator[Tensor]]  # a tensor of the file and the pieces of its bytes
HEADS = ("output.weight", "token_embd.weight")


class CalibratedRun:
    """One pass over a model.

    losses  filled while `tensors` is consumed
    """

    def __init__(
        self, model: Model, view: GGUFView, steps: tuple[Step, ...], calibration: Calibration, progress: Progress | None
    ) -> None:
        """view  the model's tensors as the file will name them; steps  one per tensor of the file."""
        self._steps = {step.tensor.name: step for step in steps}
        self._links, self._calibration = Links(view), calibration
        self._stream = BlockStream(model, self._links.read)
        self._tell = progress or (lambda done, total, what: None)
        self._curved: dict[int, Curvature] = {}
        self._shifts: dict[int, Tensor] = {}
        self.losses: list[TensorLoss] = []

    def tensors(self) -> Iterator[Written]:
        """Name and bytes of every tensor, in the order of computation.

        Raises BadWeightsError for weights or activations that are not finite.
        """
        total = self._stream.n_blocks + 1
        self._tell(0, total, "embeddings")
        hidden = self._stream.start(self._calibration.windows)
        original = list(hidden) if self._calibration.strength > 0 else []
        for index in range(self._stream.n_blocks):
            self._tell(index, total, f"block {index}")
            yield from self._block(index, hidden, original)
        self._tell(total - 1, total, "head")
        yield from self._ends(hidden)
        self._tell(total, total, "done")

    def _block(self, index: int, hidden: list[Tensor], original: list[Tensor]) -> Iterator[Written]:
        stream, links, prefix = self._stream, self._links, self._stream.prefix(index)
        block = stream.fill(index)
        taps = _Taps(prefix)
        for n, window in enumerate(hidden):
            if original:
                with watched(block, taps.remember):
                    original[n] = stream.run(index, original[n])
            with watched(block, taps.see):
                stream.run(index, window)
            taps.forget()
        self._curved.clear()
        self._shifts.clear()
        for name in links.gguf_names(prefix):
            step = self._steps.pop(name)
            yield name, self._rounded(step, [taps.of(slot) for slot in links.slots(name)], install=True)
        stream.fill(index)
        for n, window in enumerate(hidden):
            hidden[n] = stream.run(index, window)
        stream.empty(index)
        links.restore()

    def _ends(self, hidden: list[Tensor]) -> Iterator[Written]:
        """What is left: embeddings, final norm, head."""
        head = next(name for name in HEADS if name in self._steps)
        moments: Moments | None = None
        if self._steps[head].needs_moments:
            for window in hidden:
                final = self._stream.final(window)
                moments = moments or Moments(final.shape[1])
                moments.add(final)
        for name in list(self._steps):
            step = self._steps.pop(name)
            yield name, self._rounded(step, [moments if name == head else None], install=False)

    def _rounded(self, step: Step, moments: list[Moments | None], install: bool) -> Iterator[Tensor]:
        """The bytes of one tensor; its decoded values go into the block."""
        if not step.needs_moments:
            yield from plain_bytes(step)
            return
        if len(step.tensor.shape) == 2:  # parts of one matrix, such as q, k and v, are given the same input
            moments = moments[:1]
        pieces, decoded = self._matrices(step), []
        for W, seen in zip(pieces, moments, strict=True):
            quantized = self._one(step, W, seen)
            if install:
                decoded.append(quantized.dequantize())
            yield step.kind.pack(quantized)
        if install:
            self._links.replace(step.tensor.name, torch.cat(decoded).reshape(step.tensor.shape))

    def _matrices(self, step: Step) -> Iterator[Tensor]:
        """The matrices [rows, cols] float32 that have a tap each: the tensor, or one per expert."""
        for part in step.tensor.parts if len(step.tensor.shape) == 3 else [None]:
            W = part.read() if part else torch.cat([piece.read() for piece in step.tensor.parts])
            for matrix in W.unbind(0) if W.dim() == 3 else [W]:
                check_finite(step.tensor, matrix, W)
                yield matrix.float()

    def _one(self, step: Step, W: Tensor, moments: Moments | None) -> QuantizedTensor:
        effort, grid = self._calibration.effort, cast(Adaptive, step.kind.grid)
        if moments is None or moments.n_tokens == 0:
            c = curvature(torch.zeros(W.shape[1], W.shape[1]))
            inside = step.tensor.name.startswith("blk.")
            note = "no calibration token came here" if inside else "an embedding: all columns count the same"
        else:
            moments.check(step.tensor.name)
            c = self._curvature(moments)
            note = c.note
            if moments.C is not None:
                W = torch.addmm(W, W, self._shift(moments, moments.C), alpha=self._calibration.strength)
        try:
            quantized = METHODS[step.rounding](W, grid, c, effort)
            plain = nearest(W, grid)
        except OverflowError as error:
            raise too_large(step, error) from None
        after, before = (loss(W, each.dequantize(), c.H).sum().item() for each in (quantized, plain))
        counts = (moments.n_tokens, moments.n_lost, moments.n_dead) if moments else (0, 0, 0)
        name, kind = step.tensor.name, step.kind.name
        self.losses.append(TensorLoss(name, kind, step.rounding, after, before, *counts, note))
        return quantized

    def _curvature(self, moments: Moments) -> Curvature:
        """Factored once for all weights that share a tap."""
        if id(moments) not in self._curved:
            self._curved[id(moments)] = curvature(moments.H, self._calibration.effort.damping)
        return self._curved[id(moments)]

    def _shift(self, moments: Moments, C: Tensor) -> Tensor:
        """As above."""
        if id(moments) not in self._shifts:
            self._shifts[id(moments)] = target_shift(moments.H, C, self._calibration.effort.damping)
        return self._shifts[id(moments)]


class _Taps:
    """The moments of one block's inputs; weights that are given the same tensor share them."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._moments: dict[Slot, Moments] = {}
        self._original: dict[Slot, Tensor] = {}
        self._seen: list[tuple[Tensor, Moments]] = []  # of the current window; holding them keeps them apart

    def remember(self, slot: Slot, x: Tensor) -> None:
        """What the original model gives to a weight."""
        self._original[slot] = x

    def see(self, slot: Slot, x: Tensor) -> None:
        """What the quantized prefix gives to it."""
        shared = next((moments for other, moments in self._seen if other is x), None)
        if shared is not None:
            self._moments.setdefault(slot, shared)
            return
        original = self._original.get(slot) if slot[1] is None else None  # experts are given other tokens
        cols = x.shape[-1]
        moments = self._moments.setdefault(slot, Moments(cols, shifted=original is not None))
        moments.add(x.reshape(-1, cols), None if original is None else original.reshape(-1, cols))
        self._seen.append((x, moments))

    def forget(self) -> None:
        """A window is over."""
        self._seen.clear()
        self._original.clear()

    def of(self, slot: Slot) -> Moments | None:
        """The moments of a weight (full name), None when nothing was multiplied with it."""
        return self._moments.get((slot[0].removeprefix(self._prefix), slot[1]))
