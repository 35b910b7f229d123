"""`whit convert A -o B --format ...`: another file format, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from whit.checkpoints.atomic import check_apart, check_folder, check_target
from whit.cli.progress import progress_bar
from whit.models.open import open_model
from whit.pipeline.convert import GGUF, TARGETS, convert


def command(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id or a built-in name (smollm2-135m).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A GGUF file, or a folder for all other formats.")],
    target: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(TARGETS)}.")],
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round again what the format cannot hold exactly.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
) -> None:
    """Re-pack a quantized model for another runtime, bit for bit where the grids agree."""
    console = Console(highlight=False, markup=False)
    opened = open_model(model)
    if target in TARGETS:
        (check_target if target == GGUF else check_folder)(out, 0, force)  # before any work
        check_apart(out, model)
    with progress_bar("converting") as progress:
        found = convert(opened, target, out, requantize, force, progress)
    console.print(f"{out}: {found.result.n_bytes / 1e6:.2f} MB, {found.result.seconds:.2f} s", soft_wrap=True)
    if found.exact or found.rounded or found.floats:
        console.print(f"{found.exact} matrices have exactly the values that they had.")
    else:
        console.print("Nothing was quantized, and nothing is.")
    for each in found.floats:
        lost = f"a relative error of {each.error:.1e}" if each.error else "no error"
        console.print(f"  {each.name}: {each.source} is written as {each.target}, with {lost}", soft_wrap=True)
    for each in found.rounded:
        how = f"{each.source} was rounded again to {each.target}, with a relative error of {each.error:.2%}"
        console.print(f"  {each.name}: {how}", soft_wrap=True)
    console.print(f"Next: whit eval {out} --against {model}", soft_wrap=True)
