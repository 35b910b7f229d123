"""One sweep over a model: forward block by block, labels drawn at the head, and gradients back to every product.

Gradients are those of log p(y), y drawn from the model itself: their squares are the Fisher information, which is the
second-order form of the KL divergence between the model's predictions and those of weights nearby. No parameter has a
gradient, and one block is in memory at a time; what is made of inputs and gradients is up to a visitor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from whit.allocator import return_memory
from whit.calibration.labels import pieces, towards
from whit.devices import CPU
from whit.models.links import Links
from whit.models.model import Model
from whit.models.stream import BlockStream
from whit.models.taps import Slot, watched
from whit.pipeline.inputs import Inputs
from whit.pipeline.quantize import model_view

Progress = Callable[[int, int, str], None]
Origins = dict[Slot, list[tuple[str, Tensor, Tensor, Tensor]]]  # tensor, outputs, rows, scale as in Visitor.rows
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
MOST_ROWS = 1 << 17  # of a matrix in a block: 128 times this is exact in float32


class Rows(Protocol):
    """What is gathered of one tensor at one product."""

    def add(self, gradient: Tensor, x: Tensor) -> None:
        """One window: gradients [tokens, outputs of the product] and inputs [tokens, cols], where the model runs."""
        ...


class Visitor(Protocol):
    """What a sweep is made for."""

    def names(self, there: list[str]) -> list[str]:
        """Which of a block's tensors are looked at."""
        ...

    def arrives(self, x: Tensor) -> None:
        """A window at the head: its inputs [tokens, cols]."""
        ...

    def predicts(self, p: Tensor) -> None:
        """Probabilities [tokens, vocabulary] of some tokens of it, on the CPU."""
        ...

    def rows(self, name: str, slot: Slot, outputs: Tensor, in_file: Tensor, scale: Tensor, share: int) -> Rows:
        """Where the gradients of a tensor at a product go.

        outputs  which outputs of the product are the tensor's rows
        in_file  [outputs], which rows
        scale    [outputs], what those are multiplied with to become the weight's
        share    of how many products the tensor is a part
        """
        ...

    def block(self, names: list[str], inputs: Inputs, gradients: Gradients) -> None:
        """A block has been gone back through."""
        ...


class Sweep:
    """One model and one text.

    links, tensors  of the model, under GGUF names
    windows         [n, length] int64
    """

    def __init__(self, model: Model, windows: Tensor, seed: int, tell: Progress, device: torch.device = CPU) -> None:
        """device  where the model runs; labels are drawn, and what is between blocks is kept, on the CPU"""
        view = model_view(model)
        self.links = Links(view)
        self.stream = BlockStream(model, self.links.read, device)
        self.tensors = {tensor.name: tensor for tensor in view.tensors}
        self.windows, self._tell = windows, tell
        self._generator = torch.Generator().manual_seed(seed)

    def run(self, visitor: Visitor) -> list[Tensor]:
        """There and back; the gradients at the first block's input, one [1, tokens, hidden] per window."""
        stream, n = self.stream, self.stream.n_blocks
        total = 2 * n + 2
        self._tell(0, total, "embeddings")
        reached = [stream.start(self.windows)]  # before each block, of every window
        for index in range(n):
            self._tell(index + 1, total, f"block {index}")
            stream.fill(index)
            reached.append([stream.run(index, hidden) for hidden in reached[-1]])
            stream.empty(index)
        self._tell(n + 1, total, "head")
        gradients = self._head(reached.pop(), visitor)
        for index in reversed(range(n)):
            self._tell(2 * n + 1 - index, total, f"back through block {index}")
            gradients = self._block(index, reached.pop(), gradients, visitor)
            return_memory()
        self._tell(total, total, "done")
        return gradients

    def _head(self, hidden: list[Tensor], visitor: Visitor) -> list[Tensor]:
        """The gradient of the sampled labels' log-likelihood at the head's input."""
        W = self.tensors[HEAD if HEAD in self.tensors else EMBEDDING].read().to(self.stream.device)
        gradients = []
        for window in hidden:
            visitor.arrives(self.stream.final(window))
            parts = []
            for part in pieces(window.shape[1], W.shape[0]):
                at = window[:, part].detach().requires_grad_()
                logits = self.stream.logits(at, W)
                p = logits.detach().softmax(-1)
                visitor.predicts(p)
                (gradient,) = torch.autograd.grad(logits, at, towards(p, self._generator))
                parts.append(gradient)
            gradients.append(torch.cat(parts, dim=1))
        return gradients

    def _block(self, index: int, hidden: list[Tensor], gradients: list[Tensor], visitor: Visitor) -> list[Tensor]:
        """The gradients at the block's input."""
        prefix = self.stream.prefix(index)
        names = visitor.names(self.links.gguf_names(prefix))
        block, inputs = self.stream.fill(index), Inputs(prefix)
        found = Gradients(prefix, self._origins(names, prefix, block), visitor)
        before = []
        for window, gradient in zip(hidden, gradients, strict=True):
            at = window.detach().requires_grad_()
            with watched(block, lambda slot, x: found.see(slot, x, inputs), found.made):
                out = self.stream.run(index, at)
            before.append(torch.autograd.grad(out, at, gradient)[0])
            inputs.forget()
        visitor.block(names, inputs, found)
        self.stream.empty(index)
        return before

    def _origins(self, names: list[str], prefix: str, block: nn.Module) -> Origins:
        """For every weight of the block the tensors that it is made of."""
        for k, name in enumerate(names):
            numbered = torch.zeros(self.tensors[name].shape)  # in the first column, beside ones: some tables scale
            numbered[..., 0] = torch.arange(numbered.shape[-2], dtype=torch.float32) + k * MOST_ROWS
            numbered[..., 1] = 1
            self.links.replace(name, numbered)
        found: Origins = {}
        for k, name in enumerate(names):
            for slot in self.links.slots(name):
                parameter = block.get_parameter(slot[0].removeprefix(prefix))
                marks = self.links.read(slot[0], tuple(parameter.shape))
                marks = marks if slot[1] is None else marks[slot[1]]
                number, one = (marks if (marks[:, 2:] == 0).all() else marks.T)[:, :2].unbind(1)
                codes = (number / one).round().long()
                outputs = torch.nonzero(codes // MOST_ROWS == k)[:, 0]
                found.setdefault(slot, []).append((name, outputs, codes[outputs] % MOST_ROWS, one[outputs]))
        self.links.restore()
        return found


class Gradients:
    """What comes back to the outputs of a block's weights."""

    def __init__(self, prefix: str, origins: Origins, visitor: Visitor) -> None:
        self._prefix = prefix
        self._x: dict[Slot, Tensor] = {}
        self._rows: dict[Slot, dict[str, Rows]] = {}
        share: dict[str, int] = {}
        for parts in origins.values():
            for name, *_ in parts:
                share[name] = share.get(name, 0) + 1
        for slot, parts in origins.items():
            self._rows[self._key(slot)] = {
                name: visitor.rows(name, slot, outputs, rows, scale, share[name])
                for name, outputs, rows, scale in parts
            }

    def see(self, slot: Slot, x: Tensor, inputs: Inputs) -> None:
        """A product begins."""
        self._x[slot] = x.detach().reshape(-1, x.shape[-1])
        inputs.see(slot, x.detach())

    def made(self, slot: Slot, out: Tensor) -> None:
        """It is done; its gradient will come."""
        x = self._x.pop(slot)
        if out.requires_grad:
            out.register_hook(lambda gradient: self._note(slot, gradient.reshape(-1, gradient.shape[-1]), x))

    def of(self, tensor: str, slot: Slot) -> Rows:
        """What was gathered of a weight (full name)."""
        return self._rows[self._key(slot)][tensor]

    def _key(self, slot: Slot) -> Slot:
        return slot[0].removeprefix(self._prefix), slot[1]

    def _note(self, slot: Slot, gradient: Tensor, x: Tensor) -> None:
        for rows in self._rows.get(slot, {}).values():
            rows.add(gradient, x)
