"""`whit quantize MODEL --recipe NAME -o OUT`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from whit.cli.progress import progress_bar
from whit.models.open import open_model
from whit.pipeline.plan import FLOAT_GRIDS, Plan, Step
from whit.pipeline.quantize import Result, write_gguf
from whit.recipes.named import RECIPES, recipe_named
from whit.rounding.nearest import ROUNDINGS


def command(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id or a built-in name (smollm2-135m).")],
    recipe: Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The GGUF file to write.")],
    rounding: Annotated[
        str,
        typer.Option(
            help=f"One of: {', '.join(ROUNDINGS)}. `search` takes half a minute per 100M weights and gains a little."
        ),
    ] = "nearest",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Make a model smaller: write a GGUF file by a recipe."""
    console = Console(highlight=False, markup=False)
    chosen = recipe_named(recipe, rounding)
    opened = open_model(model)
    with progress_bar("quantizing") as progress:
        result = write_gguf(opened, chosen, out, overwrite=force, progress=progress)
    requantized = sorted({kind for kind in _source_types(opened) if kind.lower() not in FLOAT_GRIDS})
    print_result(console, result)
    if requantized:
        console.print(
            f"The source was already quantized ({', '.join(requantized)}): its damage is in this file too. "
            "Quantize the original if you have it."
        )
    console.print(f"Next: whit eval {out} --against {model}", soft_wrap=True)


def print_result(console: Console, result: Result) -> None:
    """The file, its size, what every type holds, and every exception with its reason."""
    plan = result.plan
    console.print(
        f"{result.path}: {result.n_bytes / 1e6:.2f} MB, {result.bits_per_weight:.2f} bits per weight, "
        f"recipe {plan.recipe.name}, {result.seconds:.2f} s",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (("type", "left"), ("tensors", "right"), ("weights", "right"), ("MB", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for kind in dict.fromkeys(step.kind.name for step in plan.steps):
        steps = [step for step in plan.steps if step.kind.name == kind]
        n_weights = sum(step.tensor.n_weights for step in steps)
        n_bytes = sum(step.announced.n_bytes for step in steps)
        table.add_row(kind, str(len(steps)), f"{n_weights:,}", f"{n_bytes / 1e6:.2f}")
    console.print(table)
    for line in exception_lines(plan):
        console.print(line, soft_wrap=True)


def exception_lines(plan: Plan) -> list[str]:
    """One line per reason and kind of tensor, such as `F32: 30 x blk.*.attn_norm.weight (a norm)`."""
    groups = Counter((step.kind.name, _family(step), step.exception) for step in plan.exceptions)
    return [f"  not by the recipe, {kind}: {n} x {family} ({reason})" for (kind, family, reason), n in groups.items()]


def _family(step: Step) -> str:
    parts = step.tensor.name.split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)


def _source_types(model: object) -> list[str]:
    source = getattr(model, "gguf_tensors", None)
    return [] if source is None else [source.info(name).dtype for name in source.names()]
