"""How fast this machine does what jobs consist of: the functions themselves, timed for moments on a model's shapes.

One block is filled from the model (or with random numbers, where only its headers are here) and run; roundings take a
few hundred random rows, on all cores at once as in a job. Wide matrices are timed on some of their columns. What a
number is for, and how it grows, is said in pipeline/duration.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import gguf
import numpy as np
import torch
from torch import Tensor

from whit.calibration.moments import Moments
from whit.calibration.text import documentation_text
from whit.checkpoints.checked import write_checked
from whit.checkpoints.hub import HubHeaders
from whit.checkpoints.source import TensorInfo, TensorSource
from whit.evaluation.compare import LOGITS
from whit.evaluation.divergence import measure
from whit.grids.grid import Adaptive, Grid
from whit.grids.named import grid_named
from whit.grids.quantized import QuantizedTensor
from whit.layouts.ggml import GGML_TYPES
from whit.models.architecture import GGUFView, gguf_view
from whit.models.links import Links
from whit.models.model import Model
from whit.models.sampling import written
from whit.models.skeleton import load_module
from whit.models.stream import BlockStream
from whit.models.taps import watched
from whit.models.tokenizer import load_tokenizer
from whit.parallel import spread
from whit.pipeline import duration as kinds
from whit.pipeline.counts import HEADS, Survey
from whit.pipeline.duration import Cost, Law, Laws, Work, powers, rounding_law
from whit.pipeline.inputs import Inputs
from whit.products import coarse_products
from whit.rounding.curvature import curvature
from whit.rounding.feedback import feedback
from whit.rounding.methods import METHODS, Effort, rounded
from whit.rounding.named import ROUNDINGS
from whit.rounding.polish import loss

WIDEST = 2048  # columns that are timed; more are reckoned
ROWS = (16, 320)  # that are rounded
TOKENS = 2048  # of random inputs
PASS_WORK = 6e10  # multiplications of one timed pass through a block at most
SHORTEST = 64  # tokens of it at least
SAMPLED = 48  # positions that are predicted
CHARACTERS = 60_000
PLAIN_WEIGHTS = 1 << 19
WRITTEN = 1 << 23  # bytes
STEPS, TEXTS = 8, 16  # tokens that are written, side by side at most
MOMENT_SECONDS = 0.03  # what is over sooner is repeated


class Machine:
    """What one model's jobs take here.

    survey  what counting has to know of the model
    """

    def __init__(self, model: Model, view: GGUFView, length: int, start: Cost) -> None:
        """Fill a block and run it.

        length  tokens of a window
        start   what the program took until now, as every job will
        Raises ModelError for what cannot be run block by block.
        """
        headers_only = isinstance(model.tensors, HubHeaders)
        self._model = replace(model, tensors=_Invented(model.tensors)) if headers_only else model
        self._start = start
        self._random = torch.Generator().manual_seed(0)
        self._links = Links(gguf_view(self._model) if headers_only else view)
        self._shapes = {tensor.name: tensor.shape for tensor in view.tensors}
        self._stream = BlockStream(self._model, self._read)
        names = self._links.gguf_names(self._stream.prefix(0))
        self._weights = sum(math.prod(self._shapes[name]) for name in names)
        self._length = min(length, max(SHORTEST, int(PASS_WORK / self._weights)))
        self._stream.start(torch.zeros(1, self._length, dtype=torch.int64))
        self._filling = _timed(lambda: self._stream.fill(0))
        self.survey = self._surveyed(view, names)

    def laws(self, work: Work, effort: Effort, folder: Path) -> Laws:
        """A law for every kind of work. folder: beside the output, where a file is written for a moment.

        Raises OutputError when nothing can be written there.
        """
        wanted = work.kinds()
        found: dict[Hashable, Law] = {kinds.START: lambda rows, cols: self._start}
        found[kinds.READ] = powers(self._filling, self._weights, 1, of_rows=1)
        found |= self._passes(wanted)
        makers: dict[Hashable, Callable[[], Law]] = {
            kinds.WRITE: lambda: _writing(folder),
            kinds.PREDICT: self._predict,
        }
        found |= {kind: make() for kind, make in makers.items() if kind in wanted}
        if kinds.DOCUMENTATION in wanted or kinds.TOKENS in wanted:
            found |= self._text()
        if kinds.MOMENT in wanted:
            found[kinds.MOMENT] = self._moments(int(wanted[kinds.MOMENT]))
        if kinds.FACTOR in wanted:
            found[kinds.FACTOR] = self._factors(int(wanted[kinds.FACTOR]))
        if kinds.STEP in wanted:
            found[kinds.STEP] = self._steps(work)
        found |= self._roundings(wanted, effort)
        found |= self._types(work)
        return found

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The first block is read; what is outside the blocks only has to be there."""
        return (
            self._links.read(name, shape) if name.startswith(self._stream.prefix(0)) else torch.zeros(1).expand(shape)
        )

    def _surveyed(self, view: GGUFView, names: Sequence[str]) -> Survey:
        inputs, block = Inputs(self._stream.prefix(0)), self._stream.fill(0)
        with watched(block, inputs.see):
            self._stream.run(0, self._hidden(self._length))
        groups: dict[int, set[str]] = {}
        for name in names:
            seen = next((each for slot in self._links.slots(name) if (each := inputs.of(slot)) is not None), None)
            if seen is not None:
                groups.setdefault(id(seen), set()).add(name.split(".", 2)[2])
        said = {key.removeprefix(f"{view.architecture}."): value for key, value in view.metadata.items()}
        heads = said.get("attention.head_count_kv", 0)
        kv_heads = heads if isinstance(heads, list) else [heads] * self._stream.n_blocks
        shared = tuple(frozenset(group) for group in groups.values())
        return Survey(shared, tuple(kv_heads), int(said.get("expert_used_count", 1)))

    def _hidden(self, tokens: int) -> Tensor:
        return torch.randn(1, tokens, self._shapes["token_embd.weight"][-1], generator=self._random)

    def _passes(self, wanted: Mapping[Hashable, float]) -> dict[Hashable, Law]:
        hidden, found = self._hidden(self._length), dict[Hashable, Law]()

        def once() -> Tensor:
            return self._stream.run(0, hidden)

        if kinds.SLOW_PASS in wanted:
            found[kinds.SLOW_PASS] = powers(_timed(once), self._weights, self._length, 1, 1)
        if kinds.PASS in wanted:
            self._stream.fuse_attention(hidden)
            with coarse_products():
                found[kinds.PASS] = powers(_timed(once), self._weights, self._length, 1, 1)
        return found

    def _moments(self, cols: int) -> Law:
        """Sums of one window at a time, a product of four."""
        cols = min(cols, WIDEST)
        x = torch.randn(TOKENS, cols, generator=self._random)
        moments = Moments(cols)

        def once() -> None:
            for part in x.split(self._length):
                moments.add(part)
            moments.settle()

        with coarse_products():
            return powers(_timed(once), TOKENS, cols, 1, 2)

    def _factors(self, cols: int) -> Law:
        cols = min(cols, WIDEST)
        H = self._second_moments(cols)
        return powers(_timed(lambda: curvature(H)), 1, cols, 0, 3)

    def _second_moments(self, cols: int) -> Tensor:
        x = torch.randn(2 * cols, cols, generator=self._random)
        return (x.T @ x / len(x)).double()

    def _roundings(self, wanted: Mapping[Hashable, float], effort: Effort) -> dict[Hashable, Law]:
        """On all cores at once: each does every task once."""
        tasks: list[tuple[Hashable, int, int]] = []
        plain: list[tuple[Hashable, int, int]] = []
        for kind, cols in wanted.items():
            if kind == kinds.LONE_FACTOR:
                tasks.append((kind, 1, min(int(cols), WIDEST)))
            elif isinstance(kind, tuple) and kind[0] in ROUNDINGS:
                plain.append((kind, max(1, PLAIN_WEIGHTS // int(cols)), int(cols)))
            elif isinstance(kind, tuple) and kind[0] in (*METHODS, kinds.SAMPLE):
                tasks += [(kind, *shape) for shape in _shapes(cast(Grid, kind[1]), int(cols))]
        moments = {cols: curvature(self._second_moments(cols)) for cols in sorted({cols for _, _, cols in tasks})}
        W = torch.randn(max([1, *(rows * cols for _, rows, cols in (*tasks, *plain))]), generator=self._random) / 50

        def work(task: tuple[Hashable, int, int]) -> dict[str, Tensor]:
            kind, rows, cols = task
            if kind == kinds.LONE_FACTOR:
                H = moments[cols].H
                return _as_tensor(_timed(lambda: curvature(H), time.thread_time))
            method, grid = cast(tuple[str, Adaptive], kind)
            part = W[: rows * cols].view(rows, cols)

            def once() -> object:
                if method in ROUNDINGS:
                    return ROUNDINGS[method](part, grid)
                c = moments[cols]
                if method == kinds.SAMPLE:
                    return loss(part, feedback(part, grid, c, late=False).dequantize(), c.H)
                return rounded(method, part, grid, c, effort)

            return _as_tensor(_timed(once, time.thread_time))

        threads = torch.get_num_threads()
        costs = [Cost(*each["cost"].tolist()) for each in spread(work, tasks * threads, lambda task: task[1] * task[2])]
        found: dict[Hashable, Law] = {}
        points: dict[Hashable, list[tuple[float, float, Cost]]] = {}
        for n, (kind, rows, cols) in enumerate(tasks):
            mean = sum(costs[n :: len(tasks)], kinds.NOTHING) * (1 / threads)
            points.setdefault(kind, []).append((rows, cols, mean))
        for kind, measured in points.items():
            if kind == kinds.LONE_FACTOR:
                found[kind] = powers(measured[0][2], 1, measured[0][1], 0, 3)
            else:
                found[kind] = rounding_law(measured[0], measured[1], measured[-1])
        for kind, rows, cols in plain:
            cost = Cost(*work((kind, rows, cols))["cost"].tolist())
            found[kind] = powers(cost, rows, cols, 1, 1)
        return found

    def _types(self, work: Work) -> dict[Hashable, Law]:
        """Codes made values and bytes, and bytes read back by the other decoder; folders by their codes alone."""
        found: dict[Hashable, Law] = {}
        for kind in work.kinds():
            if isinstance(kind, tuple) and kind[0] in (kinds.PACK, kinds.DECODE, kinds.CHECK):
                found[kind] = self._type(kind[0], str(kind[1]))
        return found

    def _type(self, what: str, name: str) -> Law:
        quantized = _quantized(name, self._random)
        n, kind = quantized.shape[0] * quantized.shape[1], GGML_TYPES.get(name)
        direction = torch.ones(quantized.shape[1])
        if what == kinds.PACK and kind is not None:
            packed = kind
            return powers(_timed(lambda: packed.pack(quantized)), n, 1, of_rows=1)
        if kind is None or what == kinds.DECODE:  # words of folders take about as long as values
            return powers(_timed(lambda: quantized.dequantize() @ direction), n, 1, of_rows=1)
        raw = kind.pack(quantized).numpy().reshape(quantized.shape[0], -1)

        def check() -> None:
            values = np.ascontiguousarray(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]), np.float32)
            _ = torch.from_numpy(values) @ direction

        return powers(_timed(check), n, 1, of_rows=1)

    def _text(self) -> dict[Hashable, Law]:
        tokenizer, texts = load_tokenizer(self._model), list[str]()
        making = once(lambda: texts.append(documentation_text("calibration").content))
        some = texts[0][:CHARACTERS]
        cutting = once(lambda: tokenizer.encode(some))
        return {
            kinds.DOCUMENTATION: lambda rows, cols: making,
            kinds.TOKENS: powers(cutting, len(some), 1, of_rows=1),
        }

    def _predict(self) -> Law:
        rows, cols = next(self._shapes[name] for name in HEADS if name in self._shapes)
        n = max(1, min(SAMPLED, LOGITS // rows))
        head, states = torch.randn(rows, cols, generator=self._random) / cols, self._hidden(n)[0]
        targets = torch.zeros(n, dtype=torch.int64)
        return powers(_timed(lambda: measure(states @ head.T, states @ head.T, targets)), n, 1, of_rows=1)

    def _steps(self, work: Work) -> Law:
        """Tokens written by a model of one block and of two, half of the context before them."""
        most = max(each.rows for each in work.alone if each.kind == kinds.STEP)
        texts, context = min(int(most), TEXTS), max(1, self._length // 2)
        prompts = torch.zeros(texts, context, dtype=torch.int64)

        def step(depth: int) -> Cost:
            module = load_module(shallow(self._model, depth), torch.bfloat16)
            written(module, prompts[:1], context + 2)  # what is made on first use
            start = once(lambda: written(module, prompts, context + 1))
            whole = once(lambda: written(module, prompts, context + 1 + STEPS))
            return positive(whole + start * -1) * (1 / STEPS)

        one, two = step(1), step(2)
        block = positive(two + one * -1)
        rest = positive(one + block * -1)
        return lambda rows, cols: (rest + block * cols) * (rows / texts)


def shallow(model: Model, depth: int) -> Model:
    """A model of the first blocks only."""
    text = model.config.get("text_config")
    config = _cut(model.config, depth)
    if isinstance(text, Mapping):
        config["text_config"] = _cut(text, depth)
    return replace(model, config=config, tensors=_Shallow(model.tensors, depth))


def _cut(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Every list with an entry per block, and their number."""
    names = ("num_hidden_layers", "n_layer", "n_layers")
    blocks = next((config[name] for name in names if name in config), None)
    cut = {
        key: value[:depth] if isinstance(value, list) and len(value) == blocks else value
        for key, value in config.items()
    }
    return cut | {name: depth for name in names if name in config}


class _Shallow:
    """A source without the blocks from `depth` on."""

    def __init__(self, source: TensorSource, depth: int) -> None:
        self._source, self._depth = source, depth

    def names(self) -> Sequence[str]:
        return [name for name in self._source.names() if all(int(n) < self._depth for n in _numbers(name)[:1])]

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str) -> Tensor:
        return self._source.read(name)


class _Invented:
    """Random numbers of the shapes that headers promise."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def names(self) -> Sequence[str]:
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str) -> Tensor:
        return torch.empty(self._source.info(name).shape).uniform_(-0.05, 0.05)


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]


def _shapes(grid: Grid, cols: int) -> list[tuple[int, int]]:
    """Rows and columns to time: few rows, many, and many of fewer columns where the grid allows it."""
    cols = min(cols, WIDEST)
    outer = grid.spans(cols)[0]
    step = 32 if outer == cols else outer
    narrow = max(step, cols // 4 // step * step)
    shapes = [(ROWS[0], cols), (ROWS[1], cols)]
    return [*shapes, (ROWS[1], narrow)] if narrow < cols else shapes


def _quantized(name: str, random: torch.Generator) -> QuantizedTensor:
    grid = GGML_TYPES[name].grid if name in GGML_TYPES else grid_named(name)
    return ROUNDINGS["nearest"](torch.randn(256, 1024, generator=random), grid)


def _writing(folder: Path) -> Law:
    values = torch.zeros(WRITTEN, dtype=torch.uint8)
    with TemporaryDirectory(dir=folder, prefix=".whit-plan.") as beside:
        cost = once(lambda: write_checked(Path(beside) / "values", {}, {"values": values}))
    return powers(cost, WRITTEN, 1, of_rows=1)


def positive(cost: Cost) -> Cost:
    """A difference of what was timed, at least nothing."""
    return Cost(max(0.0, cost.wall), max(0.0, cost.cpu))


def _as_tensor(cost: Cost) -> dict[str, Tensor]:
    return {"cost": torch.tensor([cost.wall, cost.cpu], dtype=torch.float64)}


def once(function: Callable[[], object], clock: Callable[[], float] = time.process_time) -> Cost:
    """What a call takes. clock: of the processors' time."""
    wall, cpu = time.perf_counter(), clock()
    function()
    return Cost(time.perf_counter() - wall, clock() - cpu)


def _timed(function: Callable[[], object], clock: Callable[[], float] = time.process_time) -> Cost:
    """The mean of some calls, the first left out when it is short: memory is asked for, kernels are chosen."""
    first = once(function, clock)
    if first.cpu > MOMENT_SECONDS:
        return first
    total, n = kinds.NOTHING, 0
    while n < 2 or (total.cpu < MOMENT_SECONDS and n < 20):
        total, n = total + once(function, clock), n + 1
    return total * (1 / n)
