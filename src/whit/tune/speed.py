"""How long `whit tune` takes here: what it does, counted, and models of one block and of two that do it for a moment.

What a model takes is that of its blocks and that of the rest, which the two tell apart. They are trained by the loop
that trains files, on random tokens; the grid that most weights of blocks are on stands for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from whit.grids.floats import Float
from whit.grids.grid import Grid
from whit.live.quantize import quantize
from whit.models.model import Model
from whit.models.sampling import resampled_windows
from whit.models.skeleton import load_module
from whit.pipeline.counts import split
from whit.pipeline.duration import NOTHING, READ, Amount, Cost, Law, Laws, Work, powers
from whit.pipeline.plan import Plan
from whit.pipeline.speed import once, positive, shallow
from whit.tune.adam import Adam
from whit.tune.blocks import Blocks
from whit.tune.halves import Halves
from whit.tune.metric import MOST, metrics
from whit.tune.moving import SCALES, Own, borrowers, learn
from whit.tune.teacher import Teacher
from whit.tune.train import CHECKS, Run, Tuning

# What is timed; rows of an amount are the blocks of the model.
DRAWN, LOOK, METRIC, FOLLOW, BLOCK, END = "drawn", "look", "metric", "follow", "block step", "step"
WINDOWS = 3  # of random tokens, one of them to decide on
STEPS = 3  # in a block
REPEATED = 2


def tuning_work(plan: Plan, tuning: Tuning, windows: int, held_out: int, resampled: int) -> Work:
    """What is done between a file and its training's end, with an original to follow.

    windows    of the text to train on
    held_out   to decide on
    resampled  copies of each that the original draws anew in part
    """
    depth, all_of_them = len(split(plan.steps)[0]), windows * (1 + resampled)
    between = range(0, tuning.steps, max(1, tuning.steps // CHECKS))
    looks = 2 + len(between)  # the first two: before, and after the blocks
    alone = [
        Amount("reading", READ, rows=depth, times=2),  # the file and its original
        Amount("text drawn anew", DRAWN, rows=depth, times=windows if resampled else 0),
        Amount("other text", LOOK, rows=depth, times=looks * held_out),
        Amount("steps from end to end", END, rows=depth, times=tuning.steps),
    ]
    if tuning.by_blocks(True):
        passed = 2 * (all_of_them + held_out) + 2 * held_out  # the original, the trained one, and what it lost
        alone += [
            Amount("blocks", METRIC, rows=depth, times=min(MOST, all_of_them)),
            Amount("blocks", FOLLOW, rows=depth, times=passed),
            Amount("blocks", BLOCK, rows=depth, times=tuning.block_steps),
        ]
    return Work(tuple(alone))


def tuning_laws(model: Model, plan: Plan, tuning: Tuning, length: int, resampled: int) -> Laws:
    """A law for every kind of work.

    model   what the plan is of; its first two blocks are read
    length  tokens of a window
    Raises ModelError for what transformers cannot build.
    """
    grid = _grid(plan)
    measured: list[dict[Hashable, Cost]] = []
    whole = once(lambda: measured.extend(_measured(model, depth, grid, tuning, length, resampled) for depth in (1, 2)))
    one, two = ({kind: _on_the_clock(cost, whole) for kind, cost in each.items()} for each in measured)
    found: dict[Hashable, Law] = {kind: _by_depth(one[kind], two[kind]) for kind in one if kind in two}
    for kind in (FOLLOW, BLOCK):
        found[kind] = powers(one.get(kind, NOTHING), 1, 1, of_rows=1)
    return {METRIC: powers(NOTHING, 1, 1), DRAWN: powers(NOTHING, 1, 1)} | found


def _grid(plan: Plan) -> Grid:
    """The one that most weights of blocks are on."""
    weights: Counter[Grid] = Counter()
    for steps in split(plan.steps)[0].values():
        for step in steps:
            if not isinstance(step.grid, Float):
                weights[step.grid] += step.tensor.n_weights
    return weights.most_common(1)[0][0]


def _measured(
    model: Model, depth: int, grid: Grid, tuning: Tuning, length: int, resampled: int
) -> dict[Hashable, Cost]:
    """What everything takes in a model of `depth` blocks; what is asked of one block alone only where there is one."""
    cut = shallow(model, depth)
    found: dict[Hashable, Cost] = {READ: once(lambda: load_module(cut))}
    student, original = load_module(cut), load_module(cut).requires_grad_(False)
    vocabulary = cast(Any, student).get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (WINDOWS, length), generator=torch.Generator().manual_seed(0))
    quantize(student, weights=grid, exclude=_ends(student))
    learners = learn(student, tuning.train, tuning.rank, tuning.seed, codes_later=True)
    run = Run(student, learners, ids, 1, replace(tuning, steps=1 + REPEATED))
    teacher = Teacher(original, run.ids, 1)
    if resampled:
        found[DRAWN] = _one_more(lambda n: resampled_windows(cut, ids[:n], resampled))
    blocks = Blocks(student, original, run.ids, 1)
    if blocks.n:
        found[METRIC] = _one_more(lambda n: metrics(Halves(original), blocks.originals, ids[:n]))
        found |= _in_a_block(blocks, blocks.learners(0, borrowers(student, learners)), tuning) if depth == 1 else {}
        blocks.rest()
    teacher.read(None, lambda done, total, what: None)
    run.held_out(teacher)
    found[LOOK] = _least(lambda: run.held_out(teacher))
    run.advance(teacher)
    found[END] = _least(lambda: run.advance(teacher))
    return found


def _in_a_block(blocks: Blocks, own: Own, tuning: Tuning) -> dict[Hashable, Cost]:
    """A window through one block, and a step in it."""
    if tuning.train != SCALES:
        for learner, _ in own:
            learner.free()

    def trained(steps: int) -> None:
        blocks.train(0, own, Adam(own, {}, tuning.rates), steps, tuning.block_batch, tuning.seed)

    trained(1)  # the metric is found, memory is asked for
    passes = _least(lambda: blocks.follow(0))
    none, some = _least(lambda: trained(0)), _least(lambda: trained(STEPS))
    for learner, _ in own:
        learner.commit()
    return {FOLLOW: passes * (1 / WINDOWS), BLOCK: positive(some + none * -1) * (1 / STEPS)}


def _ends(module: nn.Module) -> list[str]:
    """Embedding and head by name, which few recipes train."""
    ends = [cast(Any, module).get_input_embeddings(), cast(Any, module).get_output_embeddings()]
    return [name for name, each in module.named_modules() if any(each is end for end in ends)]


def _one_more(function: Callable[[int], object]) -> Cost:
    """What the second window takes, once the first has asked for memory and chosen kernels."""
    function(1)
    one = _least(lambda: function(1))
    return positive(_least(lambda: function(2)) + one * -1)


def _on_the_clock(cost: Cost, whole: Cost) -> Cost:
    """Seconds of processors as the clock had them for all that was timed: what one call waits for others is chance."""
    return Cost(cost.cpu * whole.wall / whole.cpu, cost.cpu)


def _least(function: Callable[[], object]) -> Cost:
    """The least of some calls: differences of what takes long are multiplied by the blocks, and what else the machine
    does with them.
    """
    return min((once(function) for _ in range(REPEATED)), key=lambda each: each.cpu)


def _by_depth(one: Cost, two: Cost) -> Law:
    """Of what takes so long in models of one block and of two; rows: blocks."""
    block = positive(two + one * -1)
    rest = positive(one + block * -1)
    return lambda rows, cols: rest + block * rows
