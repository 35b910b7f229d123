"""`whit memory MODEL`: bytes to store, run and train a model, before doing it."""

from __future__ import annotations

import json as jsonlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from whit.errors import ModelError, RecipeError
from whit.grids.named import GRIDS, grid_named
from whit.memory import (
    GB,
    GIB,
    LLAMA_CPP,
    OPTIMIZERS,
    PLAIN_BITS,
    PUBLISHED,
    RUNTIMES,
    Lora,
    RunMemory,
    TrainingMemory,
    looks_like_count,
    lora_parameters,
    parse_count,
    run_bytes,
    storage_bytes,
    train_bytes,
)
from whit.models.model import Model
from whit.models.open import open_model
from whit.shape import Shape, count_parameters, plausible_shape, shape_from_config, text_config, widest_used_row

DEFAULT_CONTEXT = 8192
# What llama.cpp can keep its KV cache in.
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
RUN_WITH = ("float16", "q8_0", "q4_0")
# Grids that differ only in how many weights share a scale fill a table of their own.
SCHEMES = ("", "-asym", "-g128", "-g128-asym", "-g64", "-g64-asym")  # in the table; --json has all
_INTEGER = re.compile(r"int(\d)(.*)")
_LORA_BASES: tuple[float, ...] = (16.0, 4.5)
_PARTS = ("weights", "optimizer", "gradients", "activations")


@dataclass(frozen=True)
class Subject:
    """What the figures are about.

    n_parameters  parameters, each once
    cols          row width for which scales are counted
    shape         dimensions that the KV cache depends on
    shape_from    where the shape comes from, for a person
    matrices      [rows, cols] of all matrices in the blocks, which adapters would sit on
    stored        bytes on disk; None when there are no files
    """

    label: str
    n_parameters: int
    cols: int
    shape: Shape
    shape_from: str
    matrices: list[tuple[int, int]]
    stored: int | None


@dataclass(frozen=True)
class Forecast:
    """Every figure, in bytes."""

    subject: Subject
    context: int
    batch: int
    cache: str
    cache_bits: float
    plain: dict[str, float]  # name -> bits per parameter
    grids: dict[str, float]
    run: dict[str, RunMemory]
    train: dict[str, TrainingMemory]


def command(
    model: Annotated[str, typer.Argument(help="8B, 8e9, 135M, a model folder, a .gguf file, a hub id (owner/name).")],
    bits: Annotated[
        float | None, typer.Option(min=0.1, max=64, help="Only for weights of this many bits, scales included.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, max=2**40, help="Positions per sequence [8192, or what the model can do].")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=2**30, help="Sequences at once.")] = 1,
    cache: Annotated[str, typer.Option(help=f"Type of the KV cache: {', '.join(CACHE_TYPES)}.")] = "f16",
    layers: Annotated[int | None, typer.Option(min=1, max=10_000, help="Layers, when MODEL is a count.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, max=2**20, help="KV heads, when MODEL is a count.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, max=2**20, help="Width of a head, for a count.")] = None,
    runtime: Annotated[str, typer.Option(help=f"What runs it: {', '.join(RUNTIMES)}.")] = LLAMA_CPP,
    lora_rank: Annotated[int, typer.Option(min=1, max=2**16, help="Rank of LoRA adapters on all matrices.")] = 16,
    json: Annotated[bool, typer.Option("--json", help="Exact figures with flat keys.")] = False,
) -> None:
    """Forecast the bytes to store, run and train a model. Of a hub model only headers are fetched."""
    if cache not in CACHE_TYPES:
        raise RecipeError(f"There is no cache type {cache!r}. Known: {', '.join(CACHE_TYPES)}.")
    if runtime not in RUNTIMES:
        raise RecipeError(f"There is no runtime {runtime!r} here. Known: {', '.join(RUNTIMES)}.")
    given = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
    overrides = {name: value for name, value in given.items() if value is not None}
    if looks_like_count(model) and not Path(model).exists():
        subject = _from_count(model, overrides)
    elif overrides:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in overrides)
        raise RecipeError(f"{options}: {model} has a shape of its own; these are for a count such as 8B.")
    else:
        subject = _from_model(open_model(model, fetch=False))
    forecast = _forecast(subject, bits, context, batch, cache, runtime, lora_rank)
    if json:
        print(jsonlib.dumps(_flat(forecast), indent=2, allow_nan=False))
    else:
        _print(Console(highlight=False), forecast, lora_rank)


# ---- what the figures are about --------------------------------------------------------------------------------


def _from_count(text: str, overrides: Mapping[str, int]) -> Subject:
    n_parameters = parse_count(text)
    name, shape = plausible_shape(n_parameters)
    source = f"assumed, that of {name}" + (" but for what was given" if overrides else "")
    shape = replace(shape, **overrides)
    return Subject(text, n_parameters, shape.hidden, shape, source, shape.matrices(), None)


def _from_model(model: Model) -> Subject:
    shapes = {name: tuple(model.tensors.info(name).shape) for name in model.tensors.names()}
    # transformers leaves the key out of config.json where its base class' default, tied, holds
    tied = bool(text_config(model.config).get("tie_word_embeddings", True))
    n_parameters = count_parameters(shapes, tied)
    if not n_parameters:
        raise ModelError(f"{model.label}: holds no weights.")
    in_blocks = [shape for name, shape in shapes.items() if re.search(r"\.\d+\.", name) and len(shape) in (2, 3)]
    matrices = [(rows, cols) for *experts, rows, cols in in_blocks for _ in range(math.prod(experts))]
    shape = shape_from_config(model.config)
    cols = widest_used_row(shapes, tied) or shape.hidden
    return Subject(model.label, n_parameters, cols, shape, "from its configuration", matrices, model.n_bytes)


def _forecast(
    subject: Subject,
    bits: float | None,
    context: int | None,
    batch: int,
    cache: str,
    runtime: str,
    lora_rank: int,
) -> Forecast:
    n, shape = subject.n_parameters, subject.shape
    if context is None:
        context = min(DEFAULT_CONTEXT, shape.max_context or DEFAULT_CONTEXT)
    cache_bits = grid_named(cache).bits_per_weight(shape.head_dim)
    if bits is None:
        plain: dict[str, float] = dict(PLAIN_BITS)
        grids = {name: grid.bits_per_weight(subject.cols) for name, grid in GRIDS.items()}
        run_with, bases = {name: (plain | grids)[name] for name in RUN_WITH}, _LORA_BASES
    else:
        plain, grids, bases = {f"{bits:g} bits": bits}, {}, (bits,)
        run_with = plain
    sizes = {name: storage_bytes(n, each) for name, each in run_with.items()}
    if subject.stored is not None:
        sizes = {"as stored": float(subject.stored)} | sizes
    run = {name: run_bytes(size, shape, context, batch, cache_bits, runtime) for name, size in sizes.items()}
    train = {"float32 adam": train_bytes(n), "16-bit adam": train_bytes(n, "16-bit")}
    train |= {f"mixed {optimizer}": train_bytes(n, "mixed", optimizer) for optimizer in OPTIMIZERS}
    adapters = lora_parameters(subject.matrices, lora_rank)
    train |= {f"lora on {b:g} bits": train_bytes(n, "16-bit", lora=Lora(b, adapters)) for b in bases}
    return Forecast(subject, context, batch, cache, cache_bits, plain, grids, run, train)


# ---- for machines ----------------------------------------------------------------------------------------------


def _flat(forecast: Forecast) -> dict[str, object]:
    """Flat keys; bytes are exact, `_gb` is 10^9 and `_gib` 2^30 bytes."""
    subject, shape = forecast.subject, forecast.subject.shape
    flat: dict[str, object] = {
        "model": subject.label,
        "parameters": subject.n_parameters,
        "row_width": subject.cols,
        "shape_from": subject.shape_from,
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "sliding_layers": shape.sliding_layers,
        "window": shape.window,
        "context": forecast.context,
        "batch": forecast.batch,
        "cache": forecast.cache,
        "cache_bits": forecast.cache_bits,
    }

    def size(key: str, n_bytes: float) -> None:
        key = _key(key)
        flat.update({f"{key}_bytes": n_bytes, f"{key}_gb": n_bytes / GB, f"{key}_gib": n_bytes / GIB})

    if subject.stored is not None:
        size("stored", subject.stored)
    for prefix, table in (("store", forecast.plain), ("grid", forecast.grids)):
        for name, bits in table.items():
            flat[_key(f"{prefix}_{name}_bits")] = bits
            size(f"{prefix}_{name}", storage_bytes(subject.n_parameters, bits))
    for name, run in forecast.run.items():
        size(f"run_{name}_weights", run.weights)
        size(f"run_{name}", run.total)
    any_run = next(iter(forecast.run.values()))
    size("kv_cache", any_run.kv_cache)
    size("working", any_run.working)
    for name, bill in forecast.train.items():
        for part in _PARTS:
            size(f"train_{name}_{part}", bill.part(part))
        size(f"train_{name}", bill.total)
    for each in PUBLISHED:
        key = f"{each.model.lower()}_{_key(each.format)}"
        flat[f"published_{key}_gb"] = each.published_gb
        size(f"forecast_{key}", each.forecast_bytes)
        flat[f"deviation_{key}_gb_percent"] = each.deviation_percent(GB)
        flat[f"deviation_{key}_gib_percent"] = each.deviation_percent(GIB)
    return flat


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name)


# ---- for people ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """A decimal unit and its binary neighbour, chosen once so that all columns compare."""

    decimal: str
    binary: str
    power: int

    def both(self, n_bytes: float) -> tuple[str, str]:
        """A size in both units, three digits."""
        return _digits(n_bytes / 1000**self.power), _digits(n_bytes / 1024**self.power)


def _units(n_bytes: float) -> Units:
    if n_bytes < 1e6:
        return Units("kB", "KiB", 1)
    if n_bytes < 1e9:
        return Units("MB", "MiB", 2)
    return Units("GB", "GiB", 3) if n_bytes < 1e15 else Units("PB", "PiB", 5)


def _digits(number: float) -> str:
    """Three digits, without an exponent."""
    decimals = max(0, 2 - math.floor(math.log10(number))) if number else 0
    return f"{number:,.{min(decimals, 4)}f}"


def _table(title: str, *columns: str) -> Table:
    """A plain table: names to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, heading in enumerate(columns):
        table.add_column(heading, justify="right" if position else "left", no_wrap=bool(position))
    return table


def _print(console: Console, forecast: Forecast, lora_rank: int) -> None:
    subject, shape, n = forecast.subject, forecast.subject.shape, forecast.subject.n_parameters
    units = _units(4 * n)
    console.print(f"[bold]{escape(subject.label)}[/bold]: {n:,} parameters")
    if subject.stored is not None:
        decimal, binary = units.both(subject.stored)
        per_weight = f"{8 * subject.stored / n:.4g} bits per weight"
        console.print(f"On disk: {decimal} {units.decimal}, {binary} {units.binary}, {per_weight}")
    console.print(f"1 GB is 10^9 bytes, 1 GiB is 2^30 bytes = {GIB / GB:.3f} GB; other units likewise.\n")
    console.print(_storage_table(forecast, units))
    if any(_INTEGER.fullmatch(name) for name in forecast.grids):
        console.print()
        console.print(_integer_table(forecast, units))
    if forecast.grids:
        console.print(
            f"Scales and offsets are counted, for rows of {subject.cols} weights; int8, int4, int2 have none."
        )

    console.print()
    console.print(_run_table(forecast, units))
    sliding = f", {shape.sliding_layers} of them with a window of {shape.window}" if shape.sliding_layers else ""
    console.print(
        f"Shape {subject.shape_from}: {shape.layers} layers{sliding}, {shape.kv_heads} KV heads of {shape.head_dim}."
        + (" Change it with --layers, --kv-heads, --head-dim." if subject.stored is None else "")
    )
    if shape.max_context and forecast.context > shape.max_context:
        console.print(f"This model was made for {shape.max_context} positions; the context asked for is longer.")

    console.print()
    console.print(_train_table(forecast, units))
    console.print(
        "bytes/p. is bytes per parameter. Activations, with temporary memory, are a high estimate for small batches. "
        "mixed: the weights are a 16-bit copy and a float32 master. lora: a frozen base and float32 adapters of rank "
        f"{lora_rank} on every matrix."
    )
    console.print()
    console.print(_published_table())
    console.print(
        "The sizes were published as GB and are GiB: read so, the forecast is off by at most 3.5 % (13 was printed "
        "without a decimal) at 16 bits, and 2.9 % for q4_0 as it was then, 5 bits with its scales. Bare 4 bits fall "
        "short by a fifth, because scales take room."
    )


def _storage_table(forecast: Forecast, units: Units) -> Table:
    """Formats of equal size share a line; integer grids have a table of their own."""
    table = _table("To store", "format", "bits", units.decimal, units.binary)
    by_bits: dict[float, list[str]] = {}
    listed = forecast.plain | {name: b for name, b in forecast.grids.items() if not _INTEGER.fullmatch(name)}
    for name, bits in listed.items():
        by_bits.setdefault(bits, []).append(name)
    for bits in sorted(by_bits, reverse=True):
        size = storage_bytes(forecast.subject.n_parameters, bits)
        table.add_row(", ".join(by_bits[bits]), f"{bits:.4g}", *units.both(size))
    return table


def _integer_table(forecast: Forecast, units: Units) -> Table:
    """Integer grids: bits down, schemes across; a decimal and a binary size in each cell."""
    cells: dict[str, dict[str, float]] = {}
    schemes: dict[str, None] = {}
    for name, bits in forecast.grids.items():
        if (match := _INTEGER.fullmatch(name)) and match[2] in SCHEMES:
            width, scheme = match.groups()
            cells.setdefault(width, {})[scheme] = bits
            schemes[scheme] = None
    title = f"Integer grids, with scales: {units.decimal} / {units.binary}"
    headings = [f"int*{scheme}".replace("-asym", "\n-asym") for scheme in schemes]  # two lines: 80 characters
    table = _table(title, "", *headings)
    for width in sorted(cells, reverse=True):
        sizes = []
        for scheme in schemes:
            size = storage_bytes(forecast.subject.n_parameters, cells[width].get(scheme, 0))
            sizes.append("/".join(units.both(size)) if size else "")
        table.add_row(f"int{width}", *sizes)
    return table


def _run_table(forecast: Forecast, units: Units) -> Table:
    title = f"To run: context {forecast.context}, batch {forecast.batch}, KV cache {forecast.cache}"
    d, b = units.decimal, units.binary
    table = _table(title, "weights", f"weights {d}", f"cache {d}", f"working {d}", f"total {d}", f"total {b}")
    for name, run in forecast.run.items():
        parts = (units.both(each)[0] for each in (run.weights, run.kv_cache, run.working))
        table.add_row(name, *parts, *units.both(run.total))
    return table


def _train_table(forecast: Forecast, units: Units) -> Table:
    table = _table(f"To train, in {units.decimal}", "", *_PARTS, "total", units.binary, "bytes/p.")
    table.padding, table.columns[0].no_wrap = (0, 1, 0, 0), True  # eight columns in 80 characters
    for name, bill in forecast.train.items():
        parts = (units.both(bill.part(part))[0] for part in _PARTS)
        per_parameter = f"{bill.total / forecast.subject.n_parameters:.4g}"
        table.add_row(name, *parts, *units.both(bill.total), per_parameter)
    return table


def _published_table() -> Table:
    title = "LLaMA 1: sizes that llama.cpp published, and the forecast"
    table = _table(title, "model", "format", "published", "GB", "off by", "GiB", "off by")
    table.columns[1].justify = "left"
    for each in PUBLISHED:
        decimal, binary = (
            (_digits(each.forecast_bytes / unit), f"{each.deviation_percent(unit):+.1f} %") for unit in (GB, GIB)
        )
        label = f"{each.format} ({each.bits:g})" if each.format.startswith("q") else each.format
        table.add_row(each.model, label, f"{each.published_gb:g} GB", *decimal, *binary)
    return table
