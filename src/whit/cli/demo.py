"""`whit demo`: the main job on a real model, from float to a measured and running file."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from whit.cli.eval import DEFAULT_WINDOWS
from whit.cli.progress import progress_bar
from whit.evaluation.compare import Comparison, compare
from whit.evaluation.text import default_text, windows
from whit.models.builtin import SMOLLM2
from whit.models.model import Model
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.quantize import Result, write_gguf
from whit.recipes.named import recipe_named
from whit.runtime.generate import Generation, generate

RECIPES = ("q8_0", "q4_0")
PROMPT = "Why is the sky blue?"
N_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """Everything that is shown of one quantized file."""

    written: Result
    compared: Comparison
    answered: Generation
    seconds: float


def command(
    keep: Annotated[Path | None, typer.Option(help="Keep the files in this folder; otherwise they are removed.")] = None,
    windows_: Annotated[int, typer.Option("--windows", help="Windows of 512 tokens to measure on.")] = DEFAULT_WINDOWS,
) -> None:
    """Quantize a real model, measure what was lost, and run it."""
    console = Console(highlight=False)
    started = time.perf_counter()
    model = open_model(SMOLLM2)
    console.print(f"SmolLM2-135M-Instruct as {' and '.join(RECIPES)}, compared with its float32 original.\n")
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        rows = _rows(console, model, keep, windows_)
    else:
        with tempfile.TemporaryDirectory(prefix="whit-demo-") as folder:
            rows = _rows(console, model, Path(folder), windows_)
    _print(console, model, rows, time.perf_counter() - started, keep)


def _rows(console: Console, model: Model, folder: Path, n_windows: int) -> list[Row]:
    text = default_text()
    ids = windows(load_tokenizer(model).encode(text.content))[:n_windows]
    console.print(f"Measured on {len(ids)} windows of 512 tokens of {text.description}.", soft_wrap=True)
    rows = []
    for name in RECIPES:
        started = time.perf_counter()
        path = folder / f"smollm2-135m.{name}.gguf"
        with progress_bar(f"{name}: quantizing") as progress:
            written = write_gguf(model, recipe_named(name), path, overwrite=True, progress=progress)
        with progress_bar(f"{name}: measuring") as progress:
            compared = compare(open_model(path), model, ids, progress=progress)
        console.print(f"\n[bold]{name}[/bold] on “{PROMPT}”")
        answer = generate(path, PROMPT, n_tokens=N_TOKENS, temperature=0.0)
        for piece in answer:
            console.print(piece, end="", markup=False, soft_wrap=True)
        console.print("\n")
        rows.append(Row(written, compared, answer, time.perf_counter() - started))
    return rows
