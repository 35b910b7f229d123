"""Training with quantization in the loop: what is multiplied with is, at every step, what a file would hold.

    quantize(model, weights=qint4)
    train(model, windows, teacher=original)
    freeze(model)

Codes find their places block by block (tune/blocks.py); after that scales, minima, norms and biases move from end to
end. Without a teacher everything moves from end to end. Matrices are rounded once per step and lent to layers; their
gradients are collected and handed to what moves (live/learner.py). Products are made in bfloat16 where the processor or
accelerator has units for it; codes are exact. Adam moves offsets in steps of the grid, scales by relative changes.

Windows that are not trained on decide which state is kept; if none is clearly better than the start, the start is.
Source: arXiv 1412.6980 (Adam); arXiv 2503.20552, arXiv 2502.04420 for distillation as the loss of quantized models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, cast

import torch
from torch import Tensor, nn

from whit.errors import RecipeError, TextError
from whit.evaluation.divergence import mean_and_error
from whit.live.learner import Learner
from whit.tune.blocks import Blocks
from whit.tune.halves import Halves, fast
from whit.tune.losses import Wanted, backward, losses
from whit.tune.moving import FULL, RANK, Own, borrowers, collect, give_back, learn, lent, settle, vectors_of

Progress = Callable[[int, int, str], None]
Save = Callable[["Run"], None]
BETAS, EPSILON = (0.9, 0.95), 1e-12
OFFSETS = ("offset", "A", "B")  # of a learner
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
    block_steps  of Adam in every block on its own, before, where there is a teacher; 0 for none: then codes move in the
                 steps from end to end
    block_batch  windows per step there
    rate         of codes: steps of the grid per step of Adam, at first
    scale_rate   relative change of scales, at 4.5 bits; more at fewer, in proportion to the step
    vector_rate  change of norms and biases, relative to their root mean square
    rank         for "lora"
    seed         of the order of windows
    minutes      stop after the check that comes after so many
    checkpoints  keep only what goes into blocks and run them twice: less memory, a third more time
    """

    train: str = FULL
    steps: int = 100
    batch: int = 4
    at_once: int = 2
    block_steps: int = 200
    block_batch: int = 4
    rate: float = 0.02
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
    blocks, steps  behind the state that was kept, both 0 for the start
    moved          share of codes that are others than at the start
    seconds        wall time
    """

    before: float
    after: float
    error: float
    blocks: int
    steps: int
    moved: float
    seconds: float

    @property
    def changed(self) -> bool:
        """Whether there is anything new."""
        return self.blocks > 0 or self.steps > 0


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
        return run.train(follow, teacher, progress)
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

    ids    [windows, length] int64, those that are not trained on first
    block  how many blocks have been trained on their own
    step   how many steps have been made end to end
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
        self._model, self._own = model, borrowers(model, learners)
        self._halves = Halves(model)
        vectors = {name: each for name, each in vectors_of(model).items() if each.requires_grad}
        self._vectors = {name: _Vector(each, (types or {}).get(name, each.dtype)) for name, each in vectors.items()}
        order = torch.Generator().manual_seed(tuning.seed)
        n, needed = len(ids) - n_held, tuning.steps * tuning.batch
        self._order = torch.cat([torch.randperm(n, generator=order) + n_held for _ in range(-(-needed // n))])
        self.block = self.step = 0
        self._start = self._state = self._copy()
        self._kept = (0, 0)  # blocks and steps behind that state
        self._first = self._best = torch.empty(0)
        self._moments: Mapping[str, Tensor] = {}  # of an earlier run
        self._moving, self._adam = _optimizer(self._own, self._vectors, tuning)
        if tuning.checkpoints:
            cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
            model.train()

    def train(
        self,
        teacher: Wanted | None,
        original: nn.Module | None = None,
        progress: Progress | None = None,
        save: Save | None = None,
    ) -> Tuned:
        """Blocks first, then end to end, until steps or minutes are over; the best state is left, still learning.

        original  whose blocks the model's learn from; None leaves that out
        save      called whenever there is something new to keep
        """
        tuning, started = self._tuning, time.perf_counter()
        tell, keep = progress or (lambda done, total, what: None), save or (lambda run: None)
        if not self._first.numel():
            tell(0, tuning.steps, "looking at other text")
            self._first = self._best = self._held_out(teacher)
        if original is not None and tuning.block_steps and not self.step:
            self._train_blocks(original, tell, keep)
            self._look(teacher)
            if self._kept == (0, 0):
                self._restore(self._start)
        self._moving, self._adam = _optimizer(self._own, self._vectors, tuning)
        self._recall_moments()
        rates = [group["lr"] for group in self._adam.param_groups]
        every = max(1, tuning.steps // CHECKS)
        while self.step < tuning.steps:
            loss = self._one(teacher, rates)
            late = tuning.minutes is not None and time.perf_counter() - started > 60 * tuning.minutes
            if self.step % every == 0 or self.step == tuning.steps or late:
                self._look(teacher)
            seen = f"other text {self._best.mean():.4f}, was {self._first.mean():.4f}"
            tell(self.step, tuning.steps, f"loss {loss:.4f}; {seen}")
            keep(self)
            if late:
                break
        mean, error = mean_and_error(self._best - self._first)
        if not mean < -CLEARLY * error:
            self._best, self._kept, self._state = self._first, (0, 0), self._start
        self._restore(self._state)
        for vector in self._vectors.values():
            vector.show()
        first, best = self._first.mean().item(), self._best.mean().item()
        return Tuned(first, best, error, *self._kept, self._moved(), time.perf_counter() - started)

    def memory(self) -> dict[str, Tensor]:
        """Everything that another run needs to go on from here."""
        found = {"at": torch.tensor([self.block, self.step, *self._kept]), "first": self._first}
        found |= {"best": self._best.clone()}
        found |= {f"now.{name}": each for name, each in self._copy().items()}
        if self._kept != (0, 0):
            found |= {f"kept.{name}": each.clone() for name, each in self._state.items()}
        if self.step:
            for name, value in self._moving.items():
                found |= {f"{key}.{name}": self._adam.state[value][key] for key in MOMENTS}
        return found

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.block, self.step, *kept = memory["at"].tolist()
        self._first, self._best, self._kept = memory["first"], memory["best"], (kept[0], kept[1])
        self._restore(_under(memory, "now."))
        if self._kept != (0, 0):
            self._state = _under(memory, "kept.")
        self._moments = memory

    def _recall_moments(self) -> None:
        """Of a run that went on end to end."""
        if self.step:
            for name, value in self._moving.items():
                self._adam.state[value] = {key: self._moments[f"{key}.{name}"].to(value.device) for key in MOMENTS}
        self._moments = {}

    def _train_blocks(self, original: nn.Module, tell: Progress, keep: Save) -> None:
        """Let every block learn from the original's; its codes stay where that leaves them."""
        tuning = self._tuning
        tell(0, 1, "looking at the blocks of the original")
        for vector in self._vectors.values():
            vector.show()
            vector.rest(True)
        blocks = Blocks(self._model, original, self.ids, self._n_held)
        for index in range(blocks.n):
            own = blocks.learners(index, self._own)
            new = index >= self.block
            adam = _optimizer(own, {}, tuning)[1] if new and own else None
            before, after = blocks.train(index, own, adam, tuning.block_steps, tuning.block_batch, tuning.seed)
            if new:
                for learner, _ in own:
                    learner.commit()
                self.block = index + 1
                tell(index + 1, blocks.n, f"block {index}: error {before:.4f} -> {after:.4f}")
                keep(self)
        if blocks.n:
            for learner, _ in self._own:  # of the embedding and the head
                learner.commit()
        for vector in self._vectors.values():
            vector.rest(False)

    def _look(self, teacher: Wanted | None) -> None:
        """Keep this state if text that is not trained on says so."""
        now = self._held_out(teacher)
        if now.mean() < self._best.mean():
            self._best, self._state, self._kept = now, self._copy(), (self.block, self.step)

    def _one(self, teacher: Wanted | None, rates: Sequence[float]) -> float:
        """A step; the mean loss before it."""
        tuning, total = self._tuning, 0.0
        chosen = self._order[self.step * tuning.batch :][: tuning.batch]
        warm = min(1.0, (self.step + 1) / WARM)
        for group, rate in zip(self._adam.param_groups, rates, strict=True):
            group["lr"] = rate * warm * 0.5 * (1 + cos(pi * self.step / tuning.steps))
        for vector in self._vectors.values():
            vector.show()
        made = lent(self._own, True)
        with fast(self.ids.device):
            for some in chosen.split(tuning.at_once):
                ids = self.ids[some]
                share = len(some) / len(chosen)
                hidden = self._halves.hidden(ids)
                total += share * backward(self._halves, hidden, some.tolist(), ids, teacher, share)
        collect(self._own, made)
        give_back(self._own)
        for vector in self._vectors.values():
            vector.collect()
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def _held_out(self, teacher: Wanted | None) -> Tensor:
        """The loss of every token that is not trained on."""
        found = []
        for vector in self._vectors.values():
            vector.show()
        lent(self._own, False)
        with torch.no_grad(), fast(self.ids.device):
            for n in range(self._n_held):
                ids = self.ids[n : n + 1]
                found.append(losses(self._halves, self._halves.hidden(ids), [n], ids, teacher))
        give_back(self._own)
        return torch.cat(found).cpu()

    def _copy(self) -> dict[str, Tensor]:
        """Codes and whatever moves, by name."""
        found = {f"{n}.codes": learner.codes for n, (learner, _) in enumerate(self._own)}
        for n, (learner, _) in enumerate(self._own):
            found |= {f"{n}.{name}": each.detach().clone() for name, each in learner.named_parameters()}
        return found | {name: each.value.detach().clone() for name, each in self._vectors.items()}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        """Back to a copy; codes that were free in it and are not any more stay where they are in it."""
        for n, (learner, _) in enumerate(self._own):
            if not any(f"{n}.{name}" in state for name in OFFSETS):
                learner.commit(state[f"{n}.codes"].to(learner.codes.device))
            elif not learner.moves_codes:
                learner.codes = state[f"{n}.codes"]
            for name, value in learner.named_parameters():
                value.data.copy_(state[f"{n}.{name}"])
        for name, vector in self._vectors.items():
            vector.value.data.copy_(state[name])

    def _moved(self) -> float:
        """The share of codes that are others than at the start."""
        pairs = [(self._start[f"{n}.codes"], one.quantized().codes) for n, (one, _) in enumerate(self._own)]
        return sum(int((a != b).sum()) for a, b in pairs) / max(1, sum(a.numel() for a, _ in pairs))


def _under(memory: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in memory.items() if name.startswith(prefix)}


class _Vector:
    """A norm or bias: what moves is float32, what is seen is as the file has it."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        self._parameter, self._dtype = parameter, dtype
        self.value = nn.Parameter(parameter.detach().float().clone())
        self.size = self.value.detach().square().mean().sqrt().item() or 1.0  # root mean square, at the start

    def rest(self, resting: bool) -> None:
        """Whether it takes no part for now."""
        self._parameter.requires_grad_(not resting)

    def show(self) -> None:
        self._parameter.data.copy_(self.value.data.to(self._dtype))

    def collect(self) -> None:
        self.value.grad = None if self._parameter.grad is None else self._parameter.grad.float()
        self._parameter.grad = None


def _optimizer(
    own: Own, vectors: Mapping[str, _Vector], tuning: Tuning
) -> tuple[dict[str, nn.Parameter], torch.optim.Adam]:
    """What moves, by name, and what moves it: rates in the units of each."""
    moving: dict[str, nn.Parameter] = {}
    groups: list[dict[str, Any]] = [{"params": [], "lr": 0.0}]
    for n, (learner, _) in enumerate(own):
        coarse = 2.0 ** (REFERENCE_BITS - learner.grid.bits_per_weight(learner.shape[1]))
        for name, value in learner.named_parameters():
            moving[f"{n}.{name}"] = value
            rate = tuning.rate if name in OFFSETS else tuning.scale_rate * coarse
            groups.append({"params": [value], "lr": rate})
    for name, vector in vectors.items():
        moving[name] = vector.value
        groups.append({"params": [vector.value], "lr": tuning.vector_rate * vector.size})
    return moving, torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
