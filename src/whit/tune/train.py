"""Training with quantization in the loop: what is multiplied with is, at every step, what a file would hold.

    quantize(model, weights=qint4)
    train(model, windows, teacher=original)
    freeze(model)

Adam on offsets (in steps of the grid), relative changes of scales and minima, norms and biases. Matrices are rounded
once per step and lent to the layers; their gradients are collected and handed to what moves (live/learner.py). Products
are made in bfloat16 where the processor or accelerator has units for it; the codes are exact.

Windows that are not trained on decide which state is kept; if none is clearly better than the start, the start is.
Source: arXiv 1412.6980 (Adam); arXiv 2503.20552, arXiv 2502.04420 for distillation as the loss of quantized models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, pi
from typing import Any, cast

import torch
from torch import Tensor, nn

from whit.errors import RecipeError, TextError
from whit.evaluation.divergence import mean_and_error
from whit.grids.quantized import QuantizedTensor
from whit.live.learner import Learner
from whit.live.quantize import twins_of
from whit.tune.halves import Halves, fast
from whit.tune.losses import Wanted, backward, losses
from whit.tune.moving import FULL, RANK, learn, settle, vectors_of

Progress = Callable[[int, int, str], None]
Save = Callable[["Run"], None]
BETAS, EPSILON = (0.9, 0.95), 1e-12
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of torch's Adam
REFERENCE_BITS = 4.5  # at which scale_rate is what it says; it falls with the step of the grid
CHECKS = 4  # looks at the text that is not trained on
CLEARLY = 2.0  # standard errors of the paired difference
WARM = 5  # steps in which rates rise


@dataclass(frozen=True)
class Tuning:
    """How long, how far, and what moves.

    train        "full", "lora" or "scales" (tune/moving.py)
    steps        of Adam
    batch        windows per step
    at_once      windows per forward pass
    rate         of codes: steps of the grid per step of Adam, at first
    scale_rate   relative change of scales, at 4.5 bits; more at fewer, in proportion to the step
    vector_rate  change of norms and biases, relative to their root mean square
    rank         for "lora"
    seed         of the order of windows
    minutes      stop after the check that comes after so many
    checkpoints  keep only what goes into blocks and run them twice: less memory, a third more time
    """

    train: str = FULL
    steps: int = 300
    batch: int = 4
    at_once: int = 2
    rate: float = 0.01
    scale_rate: float = 1e-3
    vector_rate: float = 1e-3
    rank: int = RANK
    seed: int = 0
    minutes: float | None = None
    checkpoints: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.at_once < 1:
            raise RecipeError("Training takes at least one step, and one window at a time.")


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    before, after  mean loss on the text that was not trained on, nats per token
    error          standard error of the difference
    steps          of the state that was kept, 0 for the start
    moved          share of codes that are others than at the start
    seconds        wall time
    """

    before: float
    after: float
    error: float
    steps: int
    moved: float
    seconds: float


def train(
    model: nn.Module,
    windows: Tensor,
    teacher: nn.Module | None = None,
    held_out: Tensor | None = None,
    tuning: Tuning | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Train a quantized model in place; it is left unfrozen, with codes and scales fixed.

    windows   [n, length] int64, token ids
    teacher   the float model to follow; None to learn to predict the next token
    held_out  [m, length] int64 to decide on; None takes an eighth of the windows
    Raises TextError when there are too few windows, ModelError and RecipeError as `learn` does.
    """
    tuning = tuning or Tuning()
    if held_out is None:
        if len(windows) < 4:
            raise TextError(f"{len(windows)} windows are too few to keep some apart: at least 4 are needed.")
        n = max(1, len(windows) // 8)
        held_out, windows = windows[:n], windows[n:]
    learners = learn(model, tuning.train, tuning.rank, tuning.seed)
    was_training = model.training
    try:
        run = Run(model, learners, torch.cat([held_out, windows]), len(held_out), tuning)
        follow = None if teacher is None else Teacher(teacher, run.ids, progress)
        return run.train(follow, progress)
    finally:
        settle(model)
        model.train(was_training)


class Teacher:
    """The float model's predictions, from hidden states that are found once."""

    def __init__(self, model: nn.Module, ids: Tensor, progress: Progress | None = None) -> None:
        """ids  [windows, length] int64, all windows that will be asked for"""
        self._halves, self._length = Halves(model), ids.shape[1]
        self._states: list[Tensor] = []
        for index, window in enumerate(ids):
            if progress is not None:
                progress(index, len(ids), "reading with the original")
            with torch.no_grad(), fast(window.device):
                self._states.append(self._halves.hidden(window[None]))

    def __call__(self, window: int, part: slice) -> Tensor:
        """Logits [n, vocab] of some tokens."""
        with torch.no_grad(), fast(self._states[window].device):
            return self._halves.logits(self._states[window][part])


class Run:
    """One training.

    ids      [windows, length] int64, those that are not trained on first
    step     how many have been made
    """

    def __init__(
        self,
        model: nn.Module,
        learners: Sequence[Learner],
        ids: Tensor,
        n_held: int,
        tuning: Tuning,
        types: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """types  of norms and biases in the file, by the names of parameters; they are seen as they are there"""
        self.ids, self._n_held, self._tuning = ids.to(next(model.parameters()).device), n_held, tuning
        self._model = model
        self._borrowers = [(one, [twin for twin in twins_of(model) if twin.learner is one]) for one in learners]
        self._halves = Halves(model)
        self._vectors = [_Vector(each, (types or {}).get(name, each.dtype)) for name, each in _vectors(model).items()]
        self._moving, self._adam = _optimizer(learners, dict(zip(_vectors(model), self._vectors, strict=True)), tuning)
        self._rates = [group["lr"] for group in self._adam.param_groups]
        order = torch.Generator().manual_seed(tuning.seed)
        n, needed = len(ids) - n_held, tuning.steps * tuning.batch
        self._order = torch.cat([torch.randperm(n, generator=order) + n_held for _ in range(-(-needed // n))])
        self.step = self._kept = 0
        self._first = self._best = torch.empty(0)
        self._start = self._state = self._copy()
        if tuning.checkpoints:
            cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
            model.train()

    def train(self, teacher: Wanted | None, progress: Progress | None = None, save: Save | None = None) -> Tuned:
        """Until the steps or the minutes are over; the model is left in the best state, still learning.

        save  called after every step
        """
        tuning, started = self._tuning, time.perf_counter()
        tell = progress or (lambda done, total, what: None)
        if not self.step:
            tell(0, tuning.steps, "looking at other text")
            self._first = self._best = self._held_out(teacher)
        every = max(1, tuning.steps // CHECKS)
        while self.step < tuning.steps:
            loss = self._one(teacher)
            late = tuning.minutes is not None and time.perf_counter() - started > 60 * tuning.minutes
            if self.step % every == 0 or self.step == tuning.steps or late:
                now = self._held_out(teacher)
                if now.mean() < self._best.mean():
                    self._best, self._state, self._kept = now, self._copy(), self.step
            seen = f"other text {self._best.mean():.4f}, was {self._first.mean():.4f}"
            tell(self.step, tuning.steps, f"loss {loss:.4f}; {seen}")
            if save is not None:
                save(self)
            if late:
                break
        mean, error = mean_and_error(self._best - self._first)
        if not mean < -CLEARLY * error:
            self._best, self._kept, self._state = self._first, 0, self._start
        for value, kept in zip(self._moving.values(), self._state.values(), strict=True):
            value.data.copy_(kept)
        for vector in self._vectors:
            vector.show()
        seconds = time.perf_counter() - started
        first, best = self._first.mean().item(), self._best.mean().item()
        return Tuned(first, best, error, self._kept, self._moved(), seconds)

    def memory(self) -> dict[str, Tensor]:
        """Everything that another run needs to go on from here."""
        found = {"step": torch.tensor([self.step, self._kept]), "first": self._first, "best": self._best.clone()}
        for name, value in self._moving.items():
            found |= {f"value.{name}": value.data, f"start.{name}": self._start[name]}
            found |= {f"kept.{name}": self._state[name]} if self._kept else {}
            found |= {f"{key}.{name}": self._adam.state[value][key] for key in MOMENTS}
        return found

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.step, self._kept = memory["step"].tolist()
        self._first, self._best = memory["first"], memory["best"]
        for name, value in self._moving.items():
            value.data.copy_(memory[f"value.{name}"])
            self._start[name].copy_(memory[f"start.{name}"])
            self._adam.state[value] = {key: memory[f"{key}.{name}"].to(value.device) for key in MOMENTS}
        if self._kept:
            self._state = {name: memory[f"kept.{name}"].to(value.device) for name, value in self._moving.items()}

    def _one(self, teacher: Wanted | None) -> float:
        """A step; the mean loss before it."""
        tuning, total = self._tuning, 0.0
        chosen = self._order[self.step * tuning.batch :][: tuning.batch]
        warm = min(1.0, (self.step + 1) / WARM)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * warm * 0.5 * (1 + cos(pi * self.step / tuning.steps))
        with self._lent(True) as lent:
            for some in chosen.split(tuning.at_once):
                ids = self.ids[some]
                share = len(some) / len(chosen)
                hidden = self._halves.hidden(ids)
                total += share * backward(self._halves, hidden, some.tolist(), ids, teacher, share)
            for learner, quantized, Q in lent:
                G = torch.zeros_like(Q) if Q.grad is None else Q.grad
                for value, gradient in zip(learner.moving(), learner.gradients(G, quantized), strict=True):
                    value.grad = gradient
                Q.grad = None
        for vector in self._vectors:
            vector.collect()
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def _held_out(self, teacher: Wanted | None) -> Tensor:
        """The loss of every token that is not trained on."""
        found = []
        with self._lent(False), torch.no_grad():
            for n in range(self._n_held):
                ids = self.ids[n : n + 1]
                found.append(losses(self._halves, self._halves.hidden(ids), [n], ids, teacher))
        return torch.cat(found).cpu()

    @contextmanager
    def _lent(self, gradients: bool) -> Iterator[list[tuple[Learner, QuantizedTensor, Tensor]]]:
        """While the context lasts, layers multiply with what their learners have come to."""
        lent = []
        for vector in self._vectors:
            vector.show()
        for learner, twins in self._borrowers:
            quantized = learner.quantized()
            Q = quantized.dequantize().requires_grad_(gradients)
            lent.append((learner, quantized, Q))
            for twin in twins:
                twin.lent = Q
        try:
            with fast(self.ids.device):
                yield lent
        finally:
            for _, twins in self._borrowers:
                for twin in twins:
                    twin.lent = None

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._moving.items()}

    def _moved(self) -> float:
        """The share of codes that are others than at the start."""
        others = total = 0
        for learner, _ in self._borrowers:
            others += int((learner.quantized().codes != learner.codes).sum())
            total += learner.codes.numel()
        return others / max(1, total)


class _Vector:
    """A norm or bias: what moves is float32, what is seen is as the file has it."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        self._parameter, self._dtype = parameter, dtype
        self.value = nn.Parameter(parameter.detach().float().clone())

    def show(self) -> None:
        self._parameter.data.copy_(self.value.data.to(self._dtype))

    def collect(self) -> None:
        self.value.grad = None if self._parameter.grad is None else self._parameter.grad.float()
        self._parameter.grad = None

    @property
    def rate(self) -> float:
        """Its root mean square."""
        return self.value.detach().square().mean().sqrt().item() or 1.0


def _vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in vectors_of(model).items() if each.requires_grad}


def _optimizer(
    learners: Sequence[Learner], vectors: Mapping[str, _Vector], tuning: Tuning
) -> tuple[dict[str, nn.Parameter], torch.optim.Adam]:
    """What moves, by name, and what moves it: rates in the units of each."""
    moving: dict[str, nn.Parameter] = {}
    groups: list[dict[str, Any]] = []
    for n, learner in enumerate(learners):
        coarse = 2.0 ** (REFERENCE_BITS - learner.grid.bits_per_weight(learner.shape[1]))
        for name, value in learner.named_parameters():
            moving[f"{n}.{name}"] = value
            rate = tuning.scale_rate * coarse if name.startswith("changes.") else tuning.rate
            groups.append({"params": [value], "lr": rate})
    for name, vector in vectors.items():
        moving[name] = vector.value
        groups.append({"params": [vector.value], "lr": tuning.vector_rate * vector.rate})
    return moving, torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
