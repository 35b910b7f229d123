"""`whit plan MODEL --predict`: which size loses how much, predicted before anything is written."""

from __future__ import annotations

import json as jsonlib
import shlex
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from whit.checkpoints.atomic import check_target
from whit.cli.budget import check_damages, frontier_sizes, swept, write_damages
from whit.cli.calibration import calibration_windows
from whit.cli.keep import check_types, types_of
from whit.cli.progress import progress_bar
from whit.devices import device_named
from whit.errors import RecipeError
from whit.models.open import open_model
from whit.pipeline.allocate import Allocation, Allocator
from whit.pipeline.targets import GGUF, LAYOUTS


def predict(
    model: str,
    points: int,
    calib: str,
    windows: int,
    save: Path | None,
    table: Path | None,
    check: int,
    keep: list[str] | None,
    format_: str,
    types: str | None,
    device: str,
    json: bool,
) -> None:
    """Sweep a model and print what it loses at every size; the arguments are options of `whit plan`."""
    if format_ not in LAYOUTS:
        raise RecipeError(f"--format {format_} is not one of {', '.join(LAYOUTS)}.")
    place, opened = device_named(device), open_model(model)
    if save:
        check_target(save, 0, overwrite=True)  # before any work
    chosen_from = types_of(types, format_)
    allocator = Allocator(opened, "feedback", chosen_from, format_, keep or ())
    check_types(allocator, chosen_from)
    ids = None
    if table is None or check:
        ids, source = calibration_windows(opened, windows, calib, device=place)
    damages = swept(opened, allocator, ids, table, place)
    if save:
        write_damages(damages, save)
    found = [allocator.fit(damages, n_bytes) for n_bytes in frontier_sizes(allocator, points)]
    checked: list[dict[str, Any]] = []
    if check:
        assert ids is not None
        with progress_bar("checking") as progress:
            checked = check_damages(opened, allocator, ids, check, progress, place)
    if json:
        sizes = [
            {"bytes": each.n_bytes, "bits_per_weight": 8 * each.n_bytes / allocator.n_weights, "kl": each.damage}
            for each in found
        ]
        print(jsonlib.dumps({"model": opened.label, "sizes": sizes, "checked": checked}, indent=2))
        return
    console = Console(highlight=False, markup=False)
    _print(console, allocator, found)
    if checked:
        _print_checked(console, checked)
    elif table is None:
        console.print(f"\nPredicted on {source}.", soft_wrap=True)
    table_ = f" --table {save}" if save else ""
    kept = "".join(f" --keep {shlex.quote(each)}" for each in keep or ())
    kept += f" --types {types}" if types else ""
    out = "-o OUT.gguf" if format_ == GGUF else f"--format {format_} -o OUT"
    some = found[len(found) // 2]
    console.print(f"Next: whit quantize {model} --fit {some.n_bytes}{table_}{kept} {out}", soft_wrap=True)


def _print(console: Console, allocator: Allocator, found: list[Allocation]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("MB", "bits per weight", "KL, predicted", "largest shares"):
        table.add_column(title, justify="left" if title == "largest shares" else "right")
    for each in found:
        bits = f"{8 * each.n_bytes / allocator.n_weights:.2f}"
        table.add_row(f"{each.n_bytes / 1e6:.1f}", bits, f"{each.damage:.2g}", _shares(allocator, each))
    console.print(table)


def _shares(allocator: Allocator, each: Allocation) -> str:
    sizes: dict[str, int] = {}
    for name, grid in allocator.grids(each).items():
        sizes[grid] = sizes.get(grid, 0) + allocator.weights_in(name)
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{grid} {100 * n / sum(sizes.values()):.0f} %" for grid, n in largest)


def _print_checked(console: Console, checked: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("tensor", "grid", "KL, predicted", "KL, measured"):
        table.add_column(title, justify="left" if title in ("tensor", "grid") else "right")
    for each in checked:
        table.add_row(each["tensor"], each["grid"], f"{each['predicted']:.2g}", f"{each['measured']:.2g}")
    console.print()
    console.print(table)
    logs = torch.tensor([[each["predicted"], each["measured"]] for each in checked]).double().clamp(min=1e-12).log()
    factor = (logs[:, 0] - logs[:, 1]).mean().exp().item()
    correlation = torch.corrcoef(logs.T)[0, 1].item() if len(checked) > 2 else float("nan")
    console.print(
        f"Predicted / measured: {factor:.2f} (geometric mean), correlation of the logarithms {correlation:.3f}. "
        "Both are of plain rounding; what is written loses less.",
        soft_wrap=True,
    )
