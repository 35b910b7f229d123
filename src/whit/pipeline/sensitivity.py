"""What every tensor on every grid would cost the model: KL divergence per token, from one backward sweep.

If a layer's outputs change by D x, the divergence of the model's predictions is to second order

    KL = 1/2 mean over tokens of (g . D x)^2,   g = gradient of log p(y) at the layer's output,

with y sampled from the model itself (the text's own tokens would give another matrix). Rounding errors of different
rows are independent, so what remains is 1/2 sum over rows of mean(g_r^2) * E_r with E_r the loss of the row that every
rounding here knows: E_r = D_r H D_r^T. One forward pass, one backward pass block by block, and a few rows of every
tensor rounded to every grid are enough; no parameter has a gradient, and one block is in memory at a time.

The head's mean(g_r^2) is p_r (1 - p_r) and needs no sampling. A tied embedding is counted in both roles.
Source: generalised Gauss-Newton form of the KL divergence; docs/budget.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from whit.allocator import return_memory
from whit.calibration.moments import Moments
from whit.grids.grid import Adaptive, Grid
from whit.grids.named import GRIDS
from whit.models.architecture import GGUFTensor, GGUFView
from whit.models.links import Links
from whit.models.model import Model
from whit.models.stream import BlockStream
from whit.models.taps import Slot, watched
from whit.parallel import spread
from whit.pipeline.inputs import Inputs, moments_of
from whit.rounding.curvature import Curvature, curvature
from whit.rounding.feedback import feedback
from whit.rounding.nearest import nearest
from whit.rounding.polish import loss

Progress = Callable[[int, int, str], None]
Damages = dict[str, dict[str, float]]  # tensor -> grid -> nats per token
ROWS = 64  # of every tensor that are rounded to every grid
LOGITS = 1 << 23  # values in one piece of logits
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
DAMAGE = "damage"


@dataclass(frozen=True)
class _Sample:
    """Some rows of a matrix that stand for all of them.

    W      [n, cols] float32
    scale  half the sum over all rows of mean(g_r^2); rows were drawn in proportion to it
    """

    tensor: str
    grid: str
    W: Tensor
    scale: float
    c: Curvature


def sensitivities(
    model: Model,
    view: GGUFView,
    candidates: Mapping[str, Sequence[str]],
    windows: Tensor,
    seed: int = 0,
    progress: Progress | None = None,
) -> Damages:
    """Nats per token for every tensor and each of its candidates.

    candidates  tensor name -> names of grids
    windows     [n, length] int64
    seed        of the labels
    Raises BadWeightsError for weights or activations that are not finite.
    """
    return _Sweep(model, view, candidates, windows, seed, progress or (lambda done, total, what: None)).damages()


class _Sweep:
    def __init__(
        self,
        model: Model,
        view: GGUFView,
        candidates: Mapping[str, Sequence[str]],
        windows: Tensor,
        seed: int,
        tell: Progress,
    ) -> None:
        self._links = Links(view)
        self._stream = BlockStream(model, self._links.read)
        self._tensors = {tensor.name: tensor for tensor in view.tensors}
        self._candidates, self._windows, self._tell = candidates, windows, tell
        self._generator = torch.Generator().manual_seed(seed)
        self._found: Damages = {}

    def damages(self) -> Damages:
        stream, n = self._stream, self._stream.n_blocks
        total = 2 * n + 2
        self._tell(0, total, "embeddings")
        reached = [stream.start(self._windows)]  # before each block, of every window
        for index in range(n):
            self._tell(index + 1, total, f"block {index}")
            stream.fill(index)
            reached.append([stream.run(index, hidden) for hidden in reached[-1]])
            stream.empty(index)
        self._tell(n + 1, total, "head")
        gradients = self._head(reached.pop())
        for index in reversed(range(n)):
            self._tell(2 * n + 1 - index, total, f"back through block {index}")
            gradients = self._block(index, reached.pop(), gradients)
            return_memory()
        self._embedding(gradients)
        self._tell(total, total, "done")
        return {name: self._found[name] for name in self._candidates}

    def _head(self, hidden: list[Tensor]) -> list[Tensor]:
        """Damages of the head, and the gradient of the sampled labels' log-likelihood at its input."""
        name = HEAD if HEAD in self._tensors else EMBEDDING
        W = self._tensors[name].read()
        size = max(1, LOGITS // W.shape[0])
        spread_of = torch.zeros(W.shape[0], dtype=torch.float64)  # sum of p (1 - p)
        moments, gradients = Moments(W.shape[1]), []
        for window in hidden:
            moments.add(self._stream.final(window))
            parts = []
            for part in window.split(size, dim=1):
                at = part.detach().requires_grad_()
                logits = self._stream.logits(at, W)
                p = logits.detach().softmax(-1)
                spread_of += (p - p.square()).sum(0)
                label = torch.multinomial(p, 1, generator=self._generator)
                towards = p.neg_().scatter_add_(1, label, torch.ones(label.shape))
                (gradient,) = torch.autograd.grad(logits, at, towards)
                parts.append(gradient)
            gradients.append(torch.cat(parts, dim=1))
        if name in self._candidates:
            self._add(self._samples(name, W, moments, spread_of / moments.n_tokens))
        return gradients

    def _block(self, index: int, hidden: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Damages of the block's tensors, and the gradients at its input."""
        stream, prefix = self._stream, self._stream.prefix(index)
        block, inputs, energy = stream.fill(index), Inputs(prefix), _Energy(prefix)
        before = []
        for window, gradient in zip(hidden, gradients, strict=True):
            at = window.detach().requires_grad_()
            with watched(block, lambda slot, x: inputs.see(slot, x.detach()), energy.made):
                out = stream.run(index, at)
            before.append(torch.autograd.grad(out, at, gradient)[0])
            inputs.forget()
        n_tokens = self._windows.numel()
        samples: list[_Sample] = []
        for name in self._links.gguf_names(prefix):
            if name in self._candidates:
                tensor, slots = self._tensors[name], self._links.slots(name)
                seen = moments_of(tensor.shape, inputs, slots)
                rows = [each / n_tokens for each in self._rows(tensor, slots, energy)]
                for W, moments, weight in zip(_matrices(tensor), seen, rows, strict=True):
                    samples += self._samples(name, W, moments, weight, max(8, ROWS // len(seen)))
        stream.empty(index)
        self._add(samples)
        return before

    def _embedding(self, gradients: list[Tensor]) -> None:
        """The embedding as what the first block is given: an error in it is one of the hidden states themselves."""
        if EMBEDDING not in self._candidates:
            return
        W = self._tensors[EMBEDDING].read()
        energy = torch.cat([each[0] for each in gradients]).double().square().mean(0)  # [hidden]
        uses = torch.bincount(self._windows.flatten(), minlength=W.shape[0]).double()
        # A row that is used shows its own error: H is diagonal, and the mean over uses takes the place of the sum.
        c = Curvature(energy.float().diag(), energy.sqrt().float().diag())
        rows = _drawn(uses, ROWS)
        tied = HEAD not in self._tensors
        for grid in self._candidates[EMBEDDING]:
            Q = nearest(W[rows], GRIDS[grid]) if tied or not _adaptive(GRIDS[grid]) else None
            decoded = Q.dequantize() if Q else feedback(W[rows], cast(Adaptive, GRIDS[grid]), c).dequantize()
            damage = 0.5 * loss(W[rows], decoded, c.H).mean().item()
            of_one = self._found.setdefault(EMBEDDING, {})
            of_one[grid] = of_one.get(grid, 0.0) + damage

    def _samples(
        self, name: str, W: Tensor, moments: Moments | None, weight: Tensor, n: int = ROWS
    ) -> Iterator[_Sample]:
        if moments is None or moments.is_empty:
            return
        moments.check(name)
        c, rows = curvature(moments.H), _drawn(weight, n)
        for grid in self._candidates[name]:
            yield _Sample(name, grid, W[rows], 0.5 * weight.sum().item(), c)

    def _add(self, samples: Iterable[_Sample]) -> None:
        todo = list(samples)
        for sample, found in zip(todo, spread(_damage, todo, lambda each: each.W.shape[1] ** 1.5), strict=True):
            of_one = self._found.setdefault(sample.tensor, {})
            of_one[sample.grid] = of_one.get(sample.grid, 0.0) + found[DAMAGE].item()

    def _rows(self, tensor: GGUFTensor, slots: list[Slot], energy: _Energy) -> list[Tensor]:
        """Sums of g_r^2 over tokens for every row of a tensor's matrices, in the order of the file."""
        n_rows = tensor.shape[-2]
        if len(tensor.shape) == 3:  # rows of fused experts are not told apart: all alike
            each = [energy.of(slot) for slot in slots]
            return [torch.full((n_rows,), 0.0 if e is None else e.mean().item(), dtype=torch.float64) for e in each]
        marks = torch.arange(n_rows, dtype=torch.float32)[:, None].expand(tensor.shape)
        self._links.replace(tensor.name, marks)
        found = torch.zeros(n_rows, dtype=torch.float64)
        for slot in slots:
            of_slot = energy.of(slot)
            if of_slot is not None:
                found.index_add_(0, self._file_rows(slot, of_slot.numel(), tensor.shape), of_slot)
        self._links.restore()
        return [found]

    def _file_rows(self, slot: Slot, n: int, shape: tuple[int, ...]) -> Tensor:
        """For every output of a parameter the row of the file's tensor, whose rows are numbered."""
        whole = n == shape[0]
        marks = self._links.read(slot[0], shape if whole else (n, shape[1]))
        upright = bool((marks[:, 0] == marks[:, -1]).all())
        return (marks[:, 0] if upright else marks[0]).long()


class _Energy:
    """Sums of squared gradients at the outputs of a block's weights."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._sums: dict[Slot, Tensor] = {}

    def made(self, slot: Slot, out: Tensor) -> None:
        """A product whose gradient will come."""
        if out.requires_grad:
            out.register_hook(lambda gradient: self._note(slot, gradient))

    def of(self, slot: Slot) -> Tensor | None:
        """[outputs] float64 of a weight (full name), None when nothing was multiplied with it."""
        return self._sums.get((slot[0].removeprefix(self._prefix), slot[1]))

    def _note(self, slot: Slot, gradient: Tensor) -> None:
        energy = gradient.reshape(-1, gradient.shape[-1]).double().square().sum(0)
        self._sums[slot] = self._sums[slot] + energy if slot in self._sums else energy


def _damage(sample: _Sample) -> dict[str, Tensor]:
    grid = GRIDS[sample.grid]
    if _adaptive(grid):
        Q = feedback(sample.W, cast(Adaptive, grid), sample.c).dequantize()
    else:
        Q = nearest(sample.W, grid).dequantize()
    return {DAMAGE: sample.scale * loss(sample.W, Q, sample.c.H).double().mean()}


def _drawn(weight: Tensor, n: int) -> Tensor:
    """n rows in proportion to `weight` [rows], evenly spread: every row expects weight / sum(weight) * n draws."""
    total = weight.double().cumsum(0)
    if total[-1] <= 0:
        return torch.linspace(0, weight.numel() - 1, min(n, weight.numel())).round().long()
    places = (torch.arange(n, dtype=torch.float64) + 0.5) / n * total[-1]
    return torch.searchsorted(total, places).clamp(max=weight.numel() - 1)


def _adaptive(grid: Grid) -> bool:
    return hasattr(grid, "bases")


def _matrices(tensor: GGUFTensor) -> Iterator[Tensor]:
    W = tensor.read()
    yield from W.unbind(0) if W.dim() == 3 else [W]
