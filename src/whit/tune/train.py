"""Training with quantization in the loop: what is multiplied with is, at every step, what a file would hold.

    quantize(model, weights=qint4)
    train(model, windows, teacher=original)
    freeze(model)

Codes find their places block by block (tune/blocks.py); after that scales, minima, norms and biases move from end to
end. Without a teacher everything moves from end to end. Matrices are rounded once per step and lent to layers; their
gradients are collected and handed to what moves (live/learner.py). Products are made in bfloat16 where the processor or
accelerator has units for it; codes are exact. Adam moves offsets in steps of the grid, scales by relative changes.

Windows that are not trained on decide which state is kept; if none is clearly better than the start, the start is.
Source: arXiv 2503.20552, arXiv 2502.04420 for distillation as the loss of quantized models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from whit.errors import RecipeError, TextError
from whit.evaluation.divergence import mean_and_error
from whit.live.learner import Learner
from whit.tune.adam import OFFSETS, Adam, Rates, Vector
from whit.tune.blocks import Blocks
from whit.tune.given import check_models, check_windows
from whit.tune.halves import Halves, fast
from whit.tune.losses import Wanted, backward, losses
from whit.tune.moving import FULL, RANK, SCALES, borrowers, collect, give_back, learn, lent, settle, vectors_of
from whit.tune.teacher import Progress, Teacher

Save = Callable[["Run"], None]
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of torch's Adam
CHECKS = 4  # looks at the text that is not trained on
CLEARLY = 2.0  # standard errors of the paired difference


@dataclass(frozen=True)
class Tuning:
    """How long, how far, and what moves; as it comes, what docs/benchmarks.md was measured with.

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
    minutes      stop after the block or step that comes after so many
    checkpoints  keep only what goes into blocks and run them twice: less memory, a third more time
    """

    train: str = FULL
    steps: int = 240
    batch: int = 2
    at_once: int = 1
    block_steps: int = 480
    block_batch: int = 2
    rate: float = 0.03
    scale_rate: float = 1e-3
    vector_rate: float = 1e-3
    rank: int = RANK
    seed: int = 0
    minutes: float | None = None
    checkpoints: bool = False

    @property
    def rates(self) -> Rates:
        """Of everything that moves."""
        return Rates(self.rate, self.scale_rate, self.vector_rate)

    def by_blocks(self, followed: bool) -> bool:
        """Whether codes move block by block. followed: whether there is a teacher."""
        return followed and self.block_steps > 0

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
    Raises TextError when there are too few windows or no words in them, ModelError for a teacher that is none and
    otherwise, like RecipeError, as `learn` does.
    """
    tuning = tuning or Tuning()
    check_windows(windows)
    if held_out is None:
        if len(windows) < 4:
            raise TextError(f"{len(windows)} windows are too few to keep some apart: at least 4 are needed.")
        n = max(1, len(windows) // 8)
        held_out, windows = windows[:n], windows[n:]
    check_windows(held_out)
    if held_out.shape[1] != windows.shape[1]:
        raise TextError(
            f"Windows to train on have {windows.shape[1]} tokens, those to decide on {held_out.shape[1]}: cut alike."
        )
    check_models(model, teacher, windows)
    learners = learn(model, tuning.train, tuning.rank, tuning.seed, tuning.by_blocks(teacher is not None))
    with training_mode(model, tuning.checkpoints):
        run = Run(model, learners, torch.cat([held_out, windows]), len(held_out), tuning)
        found = run.train(None if teacher is None else Teacher(teacher, run.ids, len(held_out)), progress)
    settle(model)
    return found


@contextmanager
def training_mode(model: nn.Module, checkpoints: bool) -> Iterator[None]:
    """While the context lasts nothing is dropped, and blocks are run twice where that is wanted.

    transformers runs a block twice when the block itself says that it is training; what is in it need not.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    if checkpoints:
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            module.training = bool(getattr(module, "gradient_checkpointing", False))
    try:
        yield
    finally:
        if checkpoints:
            cast(Any, model).gradient_checkpointing_disable()
        for module, mode in modes.items():
            module.training = mode


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
        self._vectors = {name: Vector(each, (types or {}).get(name, each.dtype)) for name, each in vectors.items()}
        order = torch.Generator().manual_seed(tuning.seed)
        n, needed = len(ids) - n_held, tuning.steps * tuning.batch
        self._order = torch.cat([torch.randperm(n, generator=order) + n_held for _ in range(-(-needed // n))])
        self.block = self.step = 0
        self._start = self._state = self._copy()
        self._kept = (0, 0)  # blocks and steps behind that state
        self._first = self._best = torch.empty(0)
        self._moments: Mapping[str, Tensor] = {}  # of an earlier run
        self._adam = Adam(self._own, self._vectors, tuning.rates)

    def train(
        self,
        teacher: Teacher | None,
        progress: Progress | None = None,
        save: Save | None = None,
    ) -> Tuned:
        """Blocks first, then end to end, until steps or minutes are over; the best state is left, still learning.

        teacher  whose blocks the model's learn from, and then its predictions; None for the next token
        save      called whenever there is something new to keep
        """
        tuning, started = self._tuning, time.perf_counter()

        def late() -> bool:
            return tuning.minutes is not None and time.perf_counter() - started > 60 * tuning.minutes

        tell, keep = progress or (lambda done, total, what: None), save or (lambda run: None)
        if not self._first.numel():
            tell(0, tuning.steps, "looking at other text")
            self._first = self._best = self.held_out(teacher)
        if teacher is not None:
            teacher.read(self._by_blocks(teacher, tell, keep, late) if tuning.by_blocks(True) else None, tell)
        self._adam = Adam(self._own, self._vectors, tuning.rates)
        self._recall_moments()
        every = max(1, tuning.steps // CHECKS)
        while self.step < tuning.steps:
            loss = self.advance(teacher)
            over = late()
            if self.step % every == 0 or self.step == tuning.steps or over:
                self._look(teacher)
            seen = f"other text {self._best.mean():.4f}, was {self._first.mean():.4f}"
            tell(self.step, tuning.steps, f"loss {loss:.4f}; {seen}")
            keep(self)
            if over:
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
            for name, value in self._adam.moving.items():
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
            for name, value in self._adam.moving.items():
                self._adam.state[value] = {key: self._moments[f"{key}.{name}"].to(value.device) for key in MOMENTS}
        self._moments = {}

    def _by_blocks(self, teacher: Teacher, tell: Progress, keep: Save, late: Callable[[], bool]) -> Blocks | None:
        """Let every block learn from the original's; its codes stay where that leaves them.

        Returns the original behind its last block, None when it has none. Steps from end to end that were made before
        find the very same there.
        """
        tuning, past = self._tuning, self.step > 0
        tell(0, 1, "looking at the blocks of the original")
        for vector in self._vectors.values():
            vector.show()
            vector.rest(True)
        assert teacher.model is not None
        blocks = Blocks(self._model, teacher.model, self.ids, self._n_held, tuning.seed)
        free = tuning.train != SCALES
        if free and not blocks.n:  # then they move from end to end
            for learner, _ in self._own:
                learner.free()
        for index in range(blocks.n):
            past = past or late()
            if past:  # and the model is not where the original is any more
                blocks.follow(index)
                continue
            own = blocks.learners(index, self._own)
            new = index >= self.block
            for learner, _ in own if new and free else ():
                learner.free()
            adam = Adam(own, {}, tuning.rates) if new and own else None
            before, after = blocks.train(index, own, adam, tuning.block_steps, tuning.block_batch, tuning.seed)
            if new:
                for learner, _ in own:
                    learner.commit()
                self.block = index + 1
                tell(index + 1, blocks.n, f"block {index}: error {before:.4f} -> {after:.4f}")
                keep(self)
        if blocks.n:
            blocks.rest()
        for vector in self._vectors.values():
            vector.rest(False)
        if not self.step:
            self._look(teacher)
            if self._kept == (0, 0):
                self._restore(self._start)
        return blocks if blocks.n else None

    def _look(self, teacher: Wanted | None) -> None:
        """Keep this state if text that is not trained on says so."""
        now = self.held_out(teacher)
        if now.mean() < self._best.mean():
            self._best, self._state, self._kept = now, self._copy(), (self.block, self.step)

    def advance(self, teacher: Wanted | None) -> float:
        """A step; the mean loss before it."""
        tuning, total = self._tuning, 0.0
        chosen = self._order[self.step * tuning.batch :][: tuning.batch]
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
        self._adam.step(self.step, tuning.steps)
        self.step += 1
        return total

    def held_out(self, teacher: Wanted | None) -> Tensor:
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
            learner.commit(state[f"{n}.codes"].to(learner.codes.device))
            if any(f"{n}.{name}" in state for name in OFFSETS):
                learner.free()
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
