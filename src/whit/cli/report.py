"""`whit report FILES... --against MODEL -o report.html`: one page on what files lost, with advice and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from whit.calibration.text import WINDOW
from whit.checkpoints.atomic import check_apart, check_target, whole_file
from whit.checkpoints.imatrix import read_imatrix
from whit.cli.measured import DEFAULT_WINDOWS, measured_windows
from whit.cli.progress import progress_bar
from whit.cli.ranks import DEVICE_HELP
from whit.devices import device_named
from whit.errors import OutputError
from whit.evaluation.frontier import drawing
from whit.models.open import open_model
from whit.report.advice import advice
from whit.report.facts import Report, by_size
from whit.report.gather import distinct, gathered
from whit.report.page import page
from whit.report.pictures import picture_names, pictures, save_pictures


def command(
    files: Annotated[list[Path], typer.Argument(help="GGUF files and quantized folders of one model.")],
    against: Annotated[str, typer.Option(help="The original: folder, .gguf file, hub id or built-in name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page, such as report.html.")],
    pictures_: Annotated[
        Path | None,
        typer.Option("--pictures", help="A folder for PNG and SVG files of the pictures; by default NAME-pictures."),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="An importance matrix of the model, to show what it has seen.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file in UTF-8; by default documentation that ships with Python.")
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, help=f"Use at most so many windows of {WINDOW} tokens, from the start.")
    ] = DEFAULT_WINDOWS,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace the page and pictures that exist.")] = False,
) -> None:
    """Write a page that compares quantized files with their original, and says which one to take.

    It is one HTML file that needs no network.
    """
    drawing()
    folder = pictures_ or out.with_name(f"{out.stem}-pictures")
    _check_targets(out, folder, distinct(files), force)
    check_apart(out, against, *files)
    place, original = device_named(device), open_model(against)
    importance = None if imatrix is None else (imatrix.name, read_imatrix(imatrix))
    source, used = measured_windows(original, text, windows)
    with progress_bar("measuring") as progress:
        found = gathered(files, original, used, source, importance, progress, place)
    drawn = pictures(found)
    raw = page(found, drawn).encode()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}). Choose another folder.") from None
    save_pictures(drawn, folder)
    with whole_file(out, len(raw), force) as file:
        file.write(raw)
    console = Console(highlight=False, markup=False)
    _print(console, found)
    console.print(f"Written: {out} ({len(raw) / 1e6:.1f} MB) and {2 * len(drawn)} pictures in {folder}", soft_wrap=True)


def _check_targets(out: Path, folder: Path, names: list[str], force: bool) -> None:
    """Raise OutputError, before any work, when something could not be written."""
    check_target(out, 0, force)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file. Give another folder with --pictures.")
    if not folder.exists():
        check_target(folder, 0, force)
        return
    for name in picture_names(names):
        for suffix in (".png", ".svg"):
            check_target(folder / f"{name}{suffix}", 0, force)


def _print(console: Console, report: Report) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("file", "MB", "KL", "same top token, %", "verdict"):
        table.add_column(title, justify="left" if title in ("file", "verdict") else "right")
    for each in by_size(report.files):
        result, word = each.verified.result, each.verified.verdict.word
        figures = ("-", "-")
        if result is not None:
            figures = (f"{result.kl_mean:.4f} ± {result.kl_mean_se:.4f}", f"{100 * result.same_top:.1f}")
        table.add_row(each.name, f"{each.n_bytes / 1e6:.1f}", *figures, word)
    console.print(table)
    for heading in advice(report):
        console.print(f"{heading.topic}:", soft_wrap=True)
        for sentence in heading.sentences:
            console.print(f"  {sentence}", soft_wrap=True)
    console.print(f"Measured in {report.seconds:.0f} s.")
