"""`whit frontier MODEL -o DIR`: files of several sizes, each measured, in a table, a JSON file and a picture."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from whit.calibration.text import WINDOW, default_text, read_text, windows
from whit.checkpoints.atomic import check_target, whole_file
from whit.cli.budget import frontier_sizes, read_damages, swept
from whit.cli.calibration import CALIB_HELP, calibration_for, longest
from whit.cli.eval import DEFAULT_WINDOWS
from whit.cli.progress import progress_bar
from whit.cli.ranks import DEVICE_HELP
from whit.devices import device_named
from whit.errors import OutputError, RecipeError
from whit.evaluation.compare import compare_states, final_states
from whit.evaluation.frontier import Point, draw, drawing
from whit.models.model import bits_per_weight
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.allocate import Allocator
from whit.pipeline.effort import PRESETS
from whit.pipeline.quantize import write_gguf

OURS = "Whit"


def command(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id or a built-in name (smollm2-135m).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the files, the table and the picture.")],
    points: Annotated[int, typer.Option(min=1, max=100, help="How many sizes.")] = 6,
    preset: Annotated[str, typer.Option(help=f"How much work on each: {', '.join(PRESETS)}.")] = "fast",
    calib: Annotated[str | None, typer.Option(help=CALIB_HELP, show_default=False)] = None,
    table: Annotated[Path | None, typer.Option(help="A file of `whit plan --save` instead of a sweep.")] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(help="A file of another tool to measure beside them; may be repeated.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="What to measure on; by default documentation that ships with Python.")
    ] = None,
    windows_: Annotated[int, typer.Option("--windows", min=1, help="Windows to measure on.")] = DEFAULT_WINDOWS,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Write and measure files of several sizes, so that you can choose one."""
    if preset not in PRESETS:
        raise RecipeError(f"There is no preset called {preset!r}. Known presets: {', '.join(PRESETS)}.")
    console = Console(highlight=False, markup=False)
    place, opened = device_named(device), open_model(model)
    others = [(path, open_model(path)) for path in compare or ()]  # what cannot be read says so first
    content = (default_text() if text is None else read_text(text)).content
    length = min([WINDOW, longest(opened), *(longest(each) for _, each in others)])
    ids = windows(load_tokenizer(opened).encode(content), length, windows_)
    drawing()  # without its library nothing should be written
    allocator = Allocator(opened)
    sizes = list(dict.fromkeys(frontier_sizes(allocator, points)))
    read = None if table is None else read_damages(table, allocator)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror}). Choose another folder.") from None
    name = Path(model).name.removesuffix(".gguf")
    named = {out / f"{name}-{8 * n_bytes / allocator.n_weights:.2f}bits.gguf": n_bytes for n_bytes in sizes}
    paths, sizes = list(named), list(named.values())
    for path, n_bytes in named.items():
        check_target(path, n_bytes, force)
    check_target(out / "frontier.json", 0, force)
    calibration = calibration_for(opened, preset, calib, device=place)
    damages = read or swept(opened, allocator, calibration.windows, None, place)
    files = []
    for path, n_bytes in zip(paths, sizes, strict=True):
        with progress_bar(path.name) as progress:
            write_gguf(opened, allocator.fit(damages, n_bytes).recipe, path, force, progress, calibration)
        files.append((OURS, path))
    files += [("others", path) for path, _ in others]
    measured = _measured(model, files, ids, place)
    figures = [{"by": each.by, "file": each.name, "bytes": each.n_bytes, **asdict(each.result)} for each in measured]
    raw = jsonlib.dumps(figures, indent=1).encode()
    with whole_file(out / "frontier.json", len(raw), overwrite=True) as file:
        file.write(raw)
    _print(console, measured)
    drawn = draw(measured, f"{Path(model).name}: what is lost at which size", out)
    console.print(f"Written: {', '.join(map(str, [out / 'frontier.json', *drawn]))}", soft_wrap=True)


def _measured(model: str, files: list[tuple[str, Path]], ids: Tensor, device: torch.device) -> list[Point]:
    reference, found = open_model(model), []
    with progress_bar("measuring") as progress:
        states = final_states(reference, ids, device=device)
        for done, (by, path) in enumerate(files):
            progress(done, len(files), path.name)
            candidate = open_model(path)
            result = compare_states(final_states(candidate, ids, device=device), states, ids)
            found.append(Point(by, path.name, candidate.n_bytes, bits_per_weight(candidate), result))
    return found


def _print(console: Console, points: list[Point]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("file", "MB", "bits per weight", "KL", "same top token, %", "perplexity"):
        table.add_column(title, justify="left" if title == "file" else "right")
    for each in sorted(points, key=lambda point: point.n_bytes):
        result = each.result
        table.add_row(
            each.name,
            f"{each.n_bytes / 1e6:.1f}",
            f"{each.bits_per_weight:.2f}",
            f"{result.kl_mean:.4f} ± {result.kl_mean_se:.4f}",
            f"{100 * result.same_top:.1f}",
            f"{result.perplexity:.2f} ({result.perplexity_reference:.2f})",
        )
    console.print(table)
