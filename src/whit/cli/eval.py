"""`whit eval CANDIDATE --against REFERENCE`."""

from __future__ import annotations

import json as jsonlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from whit.calibration.text import WINDOW, Text, default_text, read_text, windows
from whit.cli.calibration import longest
from whit.cli.progress import progress_bar
from whit.cli.ranks import DEVICE_HELP
from whit.devices import CPU, device_named
from whit.evaluation.compare import compare, scored
from whit.evaluation.divergence import Comparison
from whit.models.model import Model, bits_per_weight
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer

DEFAULT_WINDOWS = 24  # 6120 scored tokens; a 135M model takes about a minute on two cores


@dataclass(frozen=True)
class Measurement:
    """A comparison and everything that a reader needs to repeat it.

    text                         what was read
    length                       tokens of a window: 512, or what the shorter model reads
    n_windows, n_available       windows used, windows that the text has
    seconds                      wall time
    """

    candidate: Model
    reference: Model
    text: Text
    length: int
    n_windows: int
    n_available: int
    result: Comparison
    seconds: float


def command(
    candidate: Annotated[str, typer.Argument(help="What to measure: a .gguf file, of any tool, or a model folder.")],
    against: Annotated[str, typer.Option(help="The original: folder, .gguf file, hub id or built-in name.")],
    text: Annotated[
        Path | None, typer.Option(help="A text file in UTF-8; by default documentation that ships with Python.")
    ] = None,
    windows_: Annotated[
        int, typer.Option("--windows", help=f"Use at most so many windows of {WINDOW} tokens, from the start.")
    ] = DEFAULT_WINDOWS,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Exact figures with flat keys.")] = False,
) -> None:
    """Measure what a file lost against the original: divergence, perplexity, agreement."""
    measurement = measure_files(candidate, against, text, windows_, device_named(device))
    if json:
        print(jsonlib.dumps(flat(measurement), indent=2, allow_nan=False))
    else:
        _print(Console(highlight=False), measurement)


def measure_files(
    candidate: str, against: str, text_path: Path | None, n_windows: int, device: torch.device = CPU
) -> Measurement:
    """Open both models, cut the text with the reference's tokenizer, compare.

    Raises ModelError for either model, TextError for a text that cannot be read or scored.
    """
    started = time.perf_counter()
    opened, reference = open_model(candidate), open_model(against)
    text = default_text() if text_path is None else read_text(text_path)
    ids = load_tokenizer(reference).encode(text.content)
    length = min(WINDOW, longest(opened), longest(reference))
    used = windows(ids, length, n_windows)
    with progress_bar("measuring") as progress:
        result = compare(opened, reference, used, progress, device)
    seconds = time.perf_counter() - started
    return Measurement(opened, reference, text, length, len(used), len(ids) // length, result, seconds)


def flat(measurement: Measurement) -> dict[str, Any]:
    """The measurement for machines: one level, no infinities (an infinite value becomes null)."""
    figures = {
        "candidate": measurement.candidate.label,
        "reference": measurement.reference.label,
        **asdict(measurement.result),
        "bytes": measurement.candidate.n_bytes,
        "bytes_reference": measurement.reference.n_bytes,
        "bits_per_weight": bits_per_weight(measurement.candidate),
        "bits_per_weight_reference": bits_per_weight(measurement.reference),
        "text": measurement.text.name,
        "text_description": measurement.text.description,
        "windows": measurement.n_windows,
        "windows_available": measurement.n_available,
        "window_tokens": measurement.length,
        "dtype": "float32",
        "seconds": measurement.seconds,
    }
    broken = {key for key, value in figures.items() if isinstance(value, float) and not math.isfinite(value)}
    return {key: None if key in broken else value for key, value in figures.items()}


def _print(console: Console, measurement: Measurement) -> None:
    result, candidate, reference = measurement.result, measurement.candidate, measurement.reference
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("candidate", justify="right")
    table.add_column("reference", justify="right")
    table.add_row("size, MB", f"{candidate.n_bytes / 1e6:.1f}", f"{reference.n_bytes / 1e6:.1f}")
    table.add_row("bits per weight", f"{bits_per_weight(candidate):.2f}", f"{bits_per_weight(reference):.2f}")
    table.add_row(
        "perplexity",
        _with_error(result.perplexity, result.perplexity_se),
        _with_error(result.perplexity_reference, result.perplexity_reference_se),
    )
    table.add_row("perplexity ratio", _with_error(result.perplexity_ratio, result.perplexity_ratio_se), "1")
    table.add_row("same top token, %", _with_error(100 * result.same_top, 100 * result.same_top_se), "100")
    table.add_row("KL divergence, nats: mean", _with_error(result.kl_mean, result.kl_mean_se), "0")
    for title, value in (
        ("median", result.kl_median),
        ("99 %", result.kl_p99),
        ("99.9 %", result.kl_p999),
        ("maximum", result.kl_max),
    ):
        table.add_row(f"{title:>25}", f"{value:.3g}", "0")
    console.print(f"[bold]{escape(candidate.label)}[/bold] against {escape(reference.label)}\n", soft_wrap=True)
    console.print(table)
    first = range(measurement.length)[scored(measurement.length)]
    console.print(
        f"\nText: {escape(measurement.text.description)}. {measurement.n_windows} of {measurement.n_available} windows "
        f"of {measurement.length} tokens, no overlap, no BOS added; positions {first[0]}..{first[-1]} of each scored, "
        f"{result.tokens} tokens in all; float32; ± is one standard error; {measurement.seconds:.0f} s.",
        soft_wrap=True,
    )


def _with_error(value: float, error: float) -> str:
    """A value and its standard error to two digits of the error: 18.27 ± 0.43."""
    if not (math.isfinite(value) and math.isfinite(error)):
        return f"{value:.4g}"
    if error == 0:
        return f"{value:.4g} ± 0"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
