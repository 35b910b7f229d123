"""Distillation: scales, minima, norms and biases of a quantized file move until it predicts as the original does.

    loss = mean over tokens of KL(original || file), whole vocabulary

Codes are frozen and the size of the file stays the same. Text that is not trained on decides: the step with the lowest
divergence there is kept, and when none is clearly lower than the start, nothing changes.

The file's blocks pass through memory one at a time, forwards to the head and backwards again, each decoded when its
turn comes; the original has been run once before, and of it only the hidden states before its head are kept. Where the
processor multiplies bfloat16 in hardware, the way back does so: the gradient at the head is exact, and what a step of
Adam takes from it is mostly its sign.

Source: docs/budget.md; the loss as in arXiv 2502.04420 and mlx-lm's DWQ.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import torch
from torch import Tensor

from whit.allocator import return_memory
from whit.calibration.labels import pieces
from whit.checkpoints.atomic import check_folder, whole_file
from whit.devices import CPU
from whit.errors import ModelError
from whit.evaluation.divergence import mean_and_error
from whit.models.links import Links
from whit.models.model import Model
from whit.models.stream import BlockStream, Weights
from whit.pipeline.quantize import model_view
from whit.pipeline.rewrite import check_pair, folder_job, rewrite_folder, rewrite_gguf
from whit.pipeline.stored import stored_of
from whit.pipeline.student import Student
from whit.products import has_bfloat16

Progress = Callable[[int, int, str], None]
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
CHECKS = 4  # looks at the text that is not trained on
CLEARLY = 2.0  # standard errors of the paired difference


@dataclass(frozen=True)
class Training:
    """How long and how far.

    steps    of Adam
    batch    windows per step
    rate     relative change per step of a grid of 4.5 bits; others in proportion to their error
    minutes  stop after the check that comes after so many
    seed     of the order of windows
    """

    steps: int = 100
    batch: int = 2
    rate: float = 1e-3
    minutes: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    before, after  mean KL divergence on the text that was not trained on, nats per token
    error          standard error of the difference
    steps          of the state that was kept, 0 for the start
    seconds        wall time
    """

    before: float
    after: float
    error: float
    steps: int
    seconds: float


def distil_gguf(
    original: Model,
    candidate: Model,
    path: Path,
    train: Tensor,
    held_out: Tensor,
    training: Training | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> Distilled:
    """Write `candidate`, a GGUF file of the original, with better scales and norms to `path`; same size, same codes.

    train, held_out  [n, length] int64, windows of token ids that do not overlap
    device           where both models run; what moves is kept, and moved, on the CPU
    Raises ModelError when the candidate is no GGUF file or of another model, OutputError as `write_gguf` does.
    """
    check_pair(original, candidate)
    if candidate.gguf_tensors is None:
        raise ModelError(f"{candidate.label}: is no GGUF file.")
    tell = progress or (lambda done, total, what: None)
    with whole_file(path, candidate.gguf_tensors.n_bytes, overwrite) as file:
        run = _Run(original, candidate, train, held_out, training or Training(), tell, device)
        found = run.train()
        rewrite_gguf(candidate.gguf_tensors, file, run.student if found.steps else None)
    return found


def distil_folder(
    original: Model,
    candidate: Model,
    path: Path,
    train: Tensor,
    held_out: Tensor,
    training: Training | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> Distilled:
    """As `distil_gguf`, for a folder of quantized safetensors, which is written in its own format.

    Raises ModelError for activations that are quantized too: what moves would not see them.
    """
    check_pair(original, candidate)
    stored = stored_of(candidate)
    job = folder_job(candidate, stored)
    check_folder(path, job.n_bytes, overwrite)
    tell = progress or (lambda done, total, what: None)
    run = _Run(original, candidate, train, held_out, training or Training(), tell, device)
    found = run.train()
    rewrite_folder(job, stored, path, overwrite, run.student if found.steps else None)
    return found


class _Run:
    def __init__(
        self,
        original: Model,
        candidate: Model,
        train: Tensor,
        held_out: Tensor,
        training: Training,
        tell: Progress,
        device: torch.device,
    ) -> None:
        self._training, self._tell = training, tell
        self._windows, self._n_held = torch.cat([held_out, train]), len(held_out)
        self._teacher = _Teacher(original, self._windows, tell, device)
        self._links = Links(model_view(candidate))
        self._stream = BlockStream(candidate, self._links.read, device)
        stored = stored_of(candidate)
        self.student = Student(stored, candidate.n_bytes)
        self._tied = HEAD not in stored.names()
        self._growth = 0.0

    def train(self) -> Distilled:
        """Until the steps or the minutes are over; the student is left in the best state."""
        training, started = self._training, time.perf_counter()
        generator = torch.Generator().manual_seed(training.seed)
        order: list[int] = []
        first = best = self._held_out("before")
        state, kept = self.student.state(), 0
        every = max(1, training.steps // CHECKS)
        for step in range(1, training.steps + 1):
            self._tell(step, training.steps, f"KL {best.mean():.5f}, was {first.mean():.5f}")
            while len(order) < training.batch:
                more = torch.randperm(len(self._windows) - self._n_held, generator=generator) + self._n_held
                order += more.tolist()
            batch, order = order[: training.batch], order[training.batch :]
            self._gradients(batch)
            self.student.step(training.rate * 0.5 * (1 + cos(pi * (step - 1) / training.steps)))
            late = training.minutes is not None and time.perf_counter() - started > 60 * training.minutes
            if step % every == 0 or step == training.steps or late:
                now = self._held_out(f"after {step} steps")
                if now.mean() < best.mean():
                    best, state, kept = now, self.student.state(), step
            if late:
                break
        mean, error = mean_and_error(best - first)
        if mean > -CLEARLY * error:
            best, kept = first, 0
        self.student.restore(state)
        seconds = time.perf_counter() - started
        return Distilled(first.mean().item(), best.mean().item(), error, kept, seconds)

    def _held_out(self, when: str) -> Tensor:
        """Divergence of every token that is not trained on."""
        hidden = self._forwards(range(self._n_held), keep=False)[-1]
        head, weights = self._outer()
        head = head.to(self._stream.device)
        found = []
        for index in range(self._n_held):
            for part in pieces(hidden[index].shape[1], head.shape[0]):
                log_p = self._teacher.log_p(index, part)
                log_q = self._stream.logits(hidden[index][:, part], head, weights).log_softmax(-1)
                found.append((log_p.exp() * (log_p - log_q)).sum(-1).double())
        return torch.cat(found)

    def _forwards(self, which: range | list[int], keep: bool = True) -> list[list[Tensor]]:
        """The hidden states [1, length, hidden] of windows before every block, and after the last.

        keep  all of them; otherwise only the last
        """
        for name in (EMBEDDING, *self._outer_names()):
            self._links.replace(name, self.student.read(name))
        reached = [self._stream.start(self._windows[list(which)])]
        if not self._growth:
            self._growth = self._found_growth(self._windows[list(which)][:1], reached[0][0])
        for index in range(self._stream.n_blocks):
            weights, _ = self._decoded(index, leaves=False)
            after = [self._stream.run(index, hidden, weights) for hidden in reached[-1]]
            reached = [*reached, after] if keep else [after]
        return reached

    def _gradients(self, batch: list[int]) -> None:
        """Note the gradient of the mean loss of a batch of windows."""
        reached = self._forwards(batch)
        gradients = self._head(batch, reached.pop())
        for index in reversed(range(self._stream.n_blocks)):
            weights, leaves = self._decoded(index, leaves=True)
            wanted = {name: each for name, each in weights.items() if each.requires_grad}
            sums: list[Tensor | None] = [None] * len(wanted)
            for n, hidden in enumerate(reached.pop()):
                at = hidden.detach().requires_grad_()
                with _fast(self._stream.device):
                    out = self._stream.run(index, at, weights)
                    found = torch.autograd.grad(out, [at, *wanted.values()], gradients[n], allow_unused=True)
                gradients[n] = found[0]
                sums = [_sum(*both) for both in zip(sums, found[1:], strict=True)]
            self._back(dict(zip(wanted, sums, strict=True)), wanted, leaves)
        self._embedded(batch, gradients)
        return_memory()

    def _decoded(self, index: int, leaves: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A block's parameters by their names within it, and with `leaves` the file's tensors that they are made of."""
        stream, prefix = self._stream, self._stream.prefix(index)
        found: dict[str, Tensor] = {}
        for name in self._links.gguf_names(prefix):
            W = self.student.read(name)
            if leaves and self.student.moves(name):
                found[name] = W.requires_grad_()
            self._links.replace(name, W)
        with torch.set_grad_enabled(leaves):
            weights = {name: self._links.read(prefix + name, shape) for name, shape in stream.shapes(index).items()}
        self._links.restore()
        return weights, found

    def _back(self, gradients: dict[str, Tensor | None], weights: Weights, leaves: dict[str, Tensor]) -> None:
        """From gradients of parameters to those of the file's tensors, which the student notes."""
        given = {name: each for name, each in gradients.items() if each is not None}
        if not given:
            return
        made = torch.autograd.grad(
            [weights[name] for name in given], list(leaves.values()), list(given.values()), allow_unused=True
        )
        for name, each in zip(leaves, made, strict=True):
            if each is not None:
                self.student.note(name, each)

    def _head(self, batch: list[int], hidden: list[Tensor]) -> list[Tensor]:
        """Gradients at the last block's outputs; those of the head and of what lies before it are noted."""
        leaves = {name: self.student.read(name) for name in (self._head_name(), *self._outer_names())}
        for name, W in leaves.items():
            self._links.replace(name, W.requires_grad_() if self.student.moves(name) else W)
        with torch.enable_grad():
            head, weights = leaves[self._head_name()], self._outer_weights()
        self._links.restore()
        n_tokens = sum(each.shape[1] for each in hidden)
        parameters = {"head": head, **weights}
        wanted = {name: each for name, each in parameters.items() if each.requires_grad}
        sums: dict[str, Tensor | None] = dict.fromkeys(wanted)
        gradients = []
        for index, window in zip(batch, hidden, strict=True):
            parts = []
            for part in pieces(window.shape[1], head.shape[0]):
                at = window[:, part].detach()
                with torch.no_grad():
                    off = self._stream.logits(at, head, weights).softmax(-1)
                    off -= self._teacher.log_p(index, part).exp_()
                    off /= n_tokens
                at.requires_grad_()
                with _fast(self._stream.device):
                    logits = self._stream.logits(at, head, weights)
                    found = torch.autograd.grad(logits, [at, *wanted.values()], off.to(logits.dtype), allow_unused=True)
                parts.append(found[0])
                sums = {name: _sum(sums[name], each) for name, each in zip(wanted, found[1:], strict=True)}
            gradients.append(torch.cat(parts, dim=1))
        of_leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        self._back(sums, parameters, of_leaves)
        return gradients

    def _embedded(self, batch: list[int], gradients: list[Tensor]) -> None:
        """The gradient of the embedding as what the first block is given."""
        if not self.student.moves(EMBEDDING):
            return
        W = torch.zeros_like(self.student.read(EMBEDDING))
        for index, gradient in zip(batch, gradients, strict=True):
            W.index_add_(0, self._windows[index], gradient[0].float(), alpha=self._growth)
        self.student.note(EMBEDDING, W)

    def _found_growth(self, window: Tensor, once: Tensor) -> float:
        """What embeddings are multiplied with before the first block: 1, in Gemma models the root of their width."""
        W = self.student.read(EMBEDDING)
        self._links.replace(EMBEDDING, 2 * W)
        twice = self._stream.start(window)[0]
        self._links.replace(EMBEDDING, W)
        given = W[window[0]]
        return ((twice - once)[0] * given).sum().item() / given.square().sum().item()

    def _head_name(self) -> str:
        return EMBEDDING if self._tied else HEAD

    def _outer_names(self) -> list[str]:
        """The file's tensors that are neither in a block nor the embedding or head."""
        outer = self._stream.outer()
        return [name for each in outer for name in self._links.made_of(each)]

    def _outer(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The head and the parameters before it, as they are now."""
        for name in self._outer_names():
            self._links.replace(name, self.student.read(name))
        weights = self._outer_weights()
        self._links.restore()
        return self.student.read(self._head_name()), weights

    def _outer_weights(self) -> dict[str, Tensor]:
        return {name: self._links.read(name, shape) for name, shape in self._stream.outer().items()}


class _Teacher:
    """The original's hidden states before its head.

    n_vocab  rows of the head
    """

    def __init__(self, model: Model, windows: Tensor, tell: Progress, device: torch.device) -> None:
        view = model_view(model)
        links = Links(view)
        self._stream = BlockStream(model, links.read, device)
        hidden = self._stream.start(windows)
        for index in range(self._stream.n_blocks):
            tell(index, self._stream.n_blocks, "reading with the original")
            self._stream.fill(index)
            hidden = [self._stream.run(index, window) for window in hidden]
            self._stream.empty(index)
            return_memory()
        self._hidden = hidden
        tensors = {tensor.name: tensor for tensor in view.tensors}
        self._head = tensors[HEAD if HEAD in tensors else EMBEDDING].read().to(device)
        self.n_vocab = self._head.shape[0]

    def log_p(self, index: int, part: slice) -> Tensor:
        """[n, vocab] of some tokens of a window."""
        with torch.no_grad():
            return self._stream.logits(self._hidden[index][:, part], self._head).log_softmax(-1)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Of two gradients, None for zero."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _fast(device: torch.device) -> torch.autocast:
    """bfloat16 products where the device has them."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu" or has_bfloat16())
