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
from torch import Tensor

from whit.calibration.text import default_text, windows
from whit.cli.calibration import calibration_for
from whit.cli.eval import DEFAULT_WINDOWS
from whit.cli.progress import progress_bar
from whit.evaluation.compare import FinalStates, compare_states, final_states
from whit.evaluation.divergence import Comparison
from whit.models.builtin import SMOLLM2
from whit.models.model import Model
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.effort import Calibration
from whit.pipeline.quantize import Result, write_gguf
from whit.recipes.named import recipe_named
from whit.runtime.generate import generate

RECIPES = ("q8_0", "q4_0")
PRESET = "fast"
PROMPT = "Why is the sky blue?"
N_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """Everything that is shown of one quantized file; `seconds` is for quantizing, measuring and answering."""

    recipe: str
    written: Result
    compared: Comparison
    tokens_per_second: float
    seconds: float


def command(
    keep: Annotated[Path | None, typer.Option(help="A folder to keep the files in; else they are removed.")] = None,
    n_windows: Annotated[int, typer.Option("--windows", help="Windows of 512 tokens to measure on.")] = DEFAULT_WINDOWS,
) -> None:
    """Quantize a real model, measure what was lost, and run it."""
    console = Console(highlight=False)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="whit-demo-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = open_model(SMOLLM2)
        text = default_text()
        used = windows(load_tokenizer(model).encode(text.content), limit=n_windows)
        console.print(f"SmolLM2-135M-Instruct as {' and '.join(RECIPES)}, beside its float32 original.")
        console.print(f"Measured on {len(used)} windows of 512 tokens: {text.description}.\n", soft_wrap=True)
        with progress_bar("reading with the original") as progress:
            reference = final_states(model, used, progress)
        calibration = calibration_for(model, PRESET)
        rows = [_row(console, model, reference, used, recipe, folder, calibration) for recipe in RECIPES]
    _print(console, model, rows)
    console.print(f"\n{time.perf_counter() - started:.0f} s in all. KL is the mean divergence from the original's")
    console.print("predictions, in nats per token; same top is how often both prefer the same next token.")
    _print_next(console, rows, keep)


def _row(
    console: Console,
    model: Model,
    reference: FinalStates,
    used: Tensor,
    recipe: str,
    folder: Path,
    calibration: Calibration,
) -> Row:
    started = time.perf_counter()
    path = folder / f"{SMOLLM2}.{recipe}.gguf"
    with progress_bar(f"{recipe}: quantizing") as progress:
        named = recipe_named(recipe, "feedback")
        written = write_gguf(model, named, path, overwrite=True, progress=progress, calibration=calibration)
    with progress_bar(f"{recipe}: reading") as progress:
        candidate = final_states(open_model(path), used, progress)
    with progress_bar(f"{recipe}: comparing") as progress:
        compared = compare_states(candidate, reference, used, progress)
    console.print(f"[bold]{recipe}[/bold] answers “{PROMPT}”")
    answer = generate(path, PROMPT, n_tokens=N_TOKENS)
    for piece in answer:
        console.print(piece, end="", markup=False, soft_wrap=True)
    console.print("\n")
    return Row(recipe, written, compared, answer.tokens_per_second, time.perf_counter() - started)


def _print(console: Console, model: Model, rows: list[Row]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("MB", "bits", "KL", "perplexity", "same top", "tokens/s", "seconds"):
        table.add_column(title, justify="right")
    original = rows[0].compared
    perplexity = f"{original.perplexity_reference:.2f}"
    table.add_row("float32", f"{model.n_bytes / 1e6:.1f}", "32.00", "0", perplexity, "100 %", "", "")
    for row in rows:
        compared = row.compared
        table.add_row(
            row.recipe,
            f"{row.written.n_bytes / 1e6:.1f}",
            f"{row.written.bits_per_weight:.2f}",
            f"{compared.kl_mean:.4f}",
            f"{compared.perplexity:.2f}",
            f"{100 * compared.same_top:.1f} %",
            f"{row.tokens_per_second:.0f}",
            f"{row.seconds:.0f}",
        )
    console.print(table)


def _print_next(console: Console, rows: list[Row], keep: Path | None) -> None:
    where = rows[0].written.path if keep else f"{SMOLLM2}.q8_0.gguf"
    console.print("\nNext:")
    if not keep:
        console.print(f"  whit quantize {SMOLLM2} --recipe q8_0 -o {where}", soft_wrap=True)
    console.print(f'  whit run {where} "Tell me a story."', soft_wrap=True)
    console.print(f"  whit quantize {SMOLLM2} --recipe q4_k_m -o better.gguf", soft_wrap=True)
    console.print(f"  whit eval better.gguf --against {SMOLLM2}", soft_wrap=True)
    console.print("  whit quantize FOLDER --recipe q8_0 -o YOURS.gguf     your own model", soft_wrap=True)
