"""What `whit quantize` does, counted from a plan: how much of which kind of work (pipeline/duration.py).

Counts are exact where a plan decides: blocks are run so often on so many windows, so many second moments are factored,
so many rows are rounded on each grid. Two things are taken for granted: that every rescaling is worth it, and that
experts are given equally many tokens. The simpler way, a rate per weight for a whole job, is off by a factor of ten
between grids, presets and widths.

Left out: roundings that take gradients first, and a search for the best file of a size.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whit.errors import RecipeError
from whit.grids.floats import Float
from whit.grids.grid import Grid
from whit.pipeline.duration import (
    CHECK,
    DECODE,
    DOCUMENTATION,
    FACTOR,
    LONE_FACTOR,
    MOMENT,
    PACK,
    PASS,
    PREDICT,
    READ,
    SAMPLE,
    SLOW_PASS,
    START,
    STEP,
    TOKENS,
    WRITE,
    Amount,
    Item,
    Work,
)
from whit.pipeline.effort import Preset
from whit.pipeline.plan import Plan, Step
from whit.pipeline.rounder import BATCH, ROWS
from whit.recipes.folders import SMOOTHED
from whit.rounding.methods import FLOORS as RESCALING
from whit.transforms.absorb import block_pairs, head_pair
from whit.transforms.awq import ROWS as SAMPLED_ROWS

HEADS = ("output.weight", "token_embd.weight")


@dataclass(frozen=True)
class Survey:
    """What headers do not say of a model.

    shared    sets of matrices of a block, by their names without its prefix, that are given the same input; a matrix
              that is in none has its own
    kv_heads  key/value heads of every block
    visits    experts that a token visits
    """

    shared: tuple[frozenset[str], ...]
    kv_heads: tuple[int, ...]
    visits: int = 1


# ---- calibrated jobs -------------------------------------------------------------------------------------------


def calibrated_work(plan: Plan, windows: int, length: int, preset: Preset, survey: Survey) -> Work:
    """What is done between text and file.

    windows, length  of the calibration text
    Raises RecipeError for a rounding that takes gradients.
    """
    if any(step.needs_fisher for step in plan.steps):
        raise RecipeError("roundings that take gradients first are not timed")
    blocks, outer = split(plan.steps)
    rescaled = preset.effort.rescale
    hidden = next(step.tensor.shape[-1] for step in plan.steps if step.tensor.name == "token_embd.weight")
    work = Work((Amount("reading", READ, rows=plan.n_weights),))  # the fingerprint of the state
    for prefix, steps in blocks.items():
        index = int(prefix.split(".")[1])
        pairs = _pairs(prefix, steps, survey.kv_heads[index]) if rescaled else []
        # every window runs before and after rounding; the first block also shows what may be fused and rescaled
        extra = 0 if index else 3 + len(pairs) if pairs else 2
        smooth = plan.recipe.activations in SMOOTHED
        tried = [pair for pair in pairs if pair.samples and not smooth]
        work += Work((Amount("running blocks", PASS, block_weights(steps), length, 2 * windows + extra),))
        work += _block(prefix, steps, windows * length, survey, tried) + _rescaling(tried) + _rounded(steps)
        state = 4 * windows * length * hidden + block_weights(steps)
        work += Work((Amount("keeping the state", WRITE, rows=state),))
    return work + _ends(outer, windows, length, rescaled)


def split(steps: Sequence[Step]) -> tuple[dict[str, list[Step]], list[Step]]:
    """The steps of every block by its prefix, and all others."""
    blocks: dict[str, list[Step]] = {}
    outer: list[Step] = []
    for step in steps:
        found = re.match(r"blk\.\d+\.", step.tensor.name)
        (blocks.setdefault(found[0], []) if found else outer).append(step)
    return blocks, outer


def block_weights(steps: Sequence[Step]) -> int:
    """Weights of some steps."""
    return sum(step.tensor.n_weights for step in steps)


@dataclass(frozen=True)
class _Pair:
    """What is tried out for a pair: rows and grid of the consumers' samples; smooth ones cost next to nothing."""

    samples: tuple[tuple[Grid, int], ...]
    cols: int


def _pairs(prefix: str, steps: Sequence[Step], kv_heads: int) -> list[_Pair]:
    named = {step.tensor.name: step for step in steps}
    found = block_pairs({name: step.tensor.shape for name, step in named.items()}, prefix, kv_heads)
    return [_tried([named[n] for n in pair.producers], [named[n] for n in pair.consumers]) for pair in found]


def _tried(producers: Sequence[Step], consumers: Sequence[Step]) -> _Pair:
    rows: dict[Grid, int] = {}
    stored = any(step.stored is not None and not isinstance(step.grid, Float) for step in (*producers, *consumers))
    for step in consumers:
        if step.needs_moments and step.rounding in RESCALING and not stored:
            rows[step.grid] = rows.get(step.grid, 0) + min(SAMPLED_ROWS, step.tensor.shape[0])
    return _Pair(tuple(rows.items()), consumers[0].tensor.shape[-1])


def _block(prefix: str, steps: Sequence[Step], tokens: int, survey: Survey, tried: Sequence[_Pair]) -> Work:
    # filled, rounded, and looked at for rescaling; filled again from what was rounded, which is in memory
    alone = [Amount("reading", READ, rows=block_weights(steps), times=3 if tried else 2)]
    shapes = {step.tensor.name.removeprefix(prefix): step.tensor.shape for step in steps}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    for name in _firsts(matrices, survey):
        visits = survey.visits if len(matrices[name]) == 3 else 1
        alone.append(Amount("second moments", MOMENT, rows=tokens * visits, cols=matrices[name][-1]))
    rounded = [step.tensor.name.removeprefix(prefix) for step in steps if step.needs_moments]
    factors = Counter(_factored({name: shapes[name] for name in rounded}, survey))
    factors.update(pair.cols for pair in tried)  # again, in the new scale
    alone += [Amount("factoring", FACTOR, cols=cols, times=n) for cols, n in factors.items()]
    return Work(tuple(alone))


def _rescaling(tried: Sequence[_Pair]) -> Work:
    """Each pair without factors and with them."""
    items = tuple(
        (
            Amount("rescaling", LONE_FACTOR, cols=pair.cols),
            *(Amount("rescaling", (SAMPLE, grid), rows, pair.cols, times=2) for grid, rows in pair.samples),
        )
        for pair in tried
    )
    return Work((), (items,) if items else ())


def _factored(shapes: Mapping[str, tuple[int, ...]], survey: Survey) -> list[int]:
    """Columns of every second moment that some matrix is rounded under."""
    return [shapes[name][-1] for name in _firsts(shapes, survey) for _ in range(math.prod(shapes[name][:-2]))]


def _firsts(shapes: Mapping[str, tuple[int, ...]], survey: Survey) -> list[str]:
    """One matrix for every input."""
    found: dict[frozenset[str], str] = {}
    for name in shapes:
        mine = next((group for group in survey.shared if name in group), frozenset((name,)))
        found.setdefault(mine, name)
    return list(found.values())


def _rounded(steps: Sequence[Step]) -> Work:
    """Rounding some tensors, as `Rounder` cuts them into pieces and batches, and making bytes of all."""
    alone: list[Amount] = []
    batches: list[tuple[Item, ...]] = []
    batch: list[Item] = []
    waiting = 0
    for step in steps:
        alone += [
            _packed(step),
            Amount("packing", (DECODE, step.type), rows=step.tensor.n_weights),
        ]  # the block runs on
        if not step.needs_moments:
            alone += _plain(step)
            continue
        rows, cols = step.tensor.shape[-2:]
        size = ROWS if step.grid.row_independent else rows
        cuts = [min(size, rows - start) for start in range(0, rows, size)]
        for _ in range(math.prod(step.tensor.shape[:-2])):
            batch += [(Amount("rounding", (step.rounding, step.grid), n, cols),) for n in cuts]
            waiting += rows * cols
            if waiting >= BATCH:
                batches.append(tuple(batch))
                batch, waiting = [], 0
    return Work(tuple(alone), tuple(each for each in (*batches, tuple(batch)) if each))


def _plain(step: Step) -> list[Amount]:
    cols = step.tensor.shape[-1]
    if step.stored is not None or len(step.tensor.shape) == 1:
        return []
    return [Amount("rounding", (step.rounding, step.grid), step.tensor.n_weights // cols, cols)]


def _ends(outer: Sequence[Step], windows: int, length: int, rescaled: bool) -> Work:
    named = {step.tensor.name: step for step in outer}
    head = next(named[name] for name in HEADS if name in named)
    cols, alone = head.tensor.shape[-1], [Amount("reading", READ, rows=2 * block_weights(outer))]
    if head.needs_moments:
        alone.append(Amount("second moments", MOMENT, rows=windows * length, cols=cols))
        alone.append(Amount("factoring", FACTOR, cols=cols))
    tried: list[_Pair] = []
    if rescaled and (pair := head_pair({name: step.tensor.shape for name, step in named.items()})):
        tried = [_tried([named[n] for n in pair.producers], [named[n] for n in pair.consumers])]
        tried = [each for each in tried if each.samples]
    alone += [Amount("factoring", FACTOR, cols=each.cols) for each in tried]
    return Work(tuple(alone)) + _rescaling(tried) + _rounded(outer)


# ---- everything else -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """What is calibrated on.

    windows     of `length` tokens
    sampled     how many of them the model writes itself, side by side, batch by batch
    characters  of the text that is cut into tokens, 0 for none
    documents   whether that is Python's documentation
    """

    windows: int
    length: int
    sampled: tuple[int, ...] = ()
    characters: int = 0
    documents: bool = False


def job_work(plan: Plan, n_bytes: int, text: Text, preset: Preset, survey: Survey, looked: int | None) -> Work:
    """All of `whit quantize`.

    n_bytes  of the output
    looked   windows that the verdict reads, 0 when it only reads the file again; None for no verdict
    Raises RecipeError as `calibrated_work` does.
    """
    work = _output_work(n_bytes)
    if any(step.needs_moments for step in plan.steps):
        work += _text_work(text, len(survey.kv_heads))
        work += calibrated_work(plan, text.windows, text.length, preset, survey)
    else:
        work += _plain_work(plan)
    return work if looked is None else work + _verdict_work(plan, looked, text.length)


def _plain_work(plan: Plan) -> Work:
    """A job that needs no text."""
    work = Work((Amount("reading", READ, rows=plan.n_weights),))
    return work + Work(tuple(each for step in plan.steps for each in (*_plain(step), _packed(step))))


def _packed(step: Step) -> Amount:
    return Amount("packing", (PACK, step.type), rows=step.tensor.n_weights)


def _output_work(n_bytes: int) -> Work:
    """The program started, and what is written."""
    return Work((Amount("starting", START), Amount("writing", WRITE, rows=n_bytes)))


def _text_work(text: Text, n_blocks: int) -> Work:
    alone = [Amount("text", DOCUMENTATION)] if text.documents else []
    alone += [Amount("text", TOKENS, rows=text.characters)] if text.characters else []
    alone += [Amount("text of the model", STEP, rows=n, cols=n_blocks, times=text.length - 1) for n in text.sampled]
    return Work(tuple(alone))


def _verdict_work(plan: Plan, windows: int, length: int) -> Work:
    """The look at what was written: every tensor read back, and both models on a few windows (none when too large)."""
    blocks, _ = split(plan.steps)
    alone = [
        Amount("verdict", (DECODE, step.type), rows=step.tensor.n_weights) for step in plan.steps
    ]  # for its sketch
    alone += [
        Amount("verdict", (CHECK, step.type), rows=step.tensor.n_weights, times=2 if windows else 1)
        for step in plan.steps
    ]
    if windows:
        characters = 8 * windows * length
        alone += [Amount("verdict", DOCUMENTATION), Amount("verdict", TOKENS, rows=characters)]
        alone += [Amount("verdict", SLOW_PASS, block_weights(each), length, 2 * windows) for each in blocks.values()]
        alone += [
            Amount("verdict", READ, rows=plan.n_weights),
            Amount("verdict", PREDICT, rows=windows * (length - length // 2 - 1)),
        ]
    return Work(tuple(alone))
