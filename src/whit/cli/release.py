"""`whit release MODEL -o DIR`: several files of one model, measured and verified, with a card to publish."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from whit.calibration.text import Text
from whit.checkpoints.atomic import check_place
from whit.cli.budget import parse_size
from whit.cli.calibration import CALIB_HELP, calibration_for
from whit.cli.measured import measured_windows
from whit.cli.progress import progress_bar
from whit.cli.ranks import DEVICE_HELP
from whit.devices import device_named
from whit.errors import CheckFailedError, MissingPackageError, RecipeError
from whit.models.open import open_model
from whit.pipeline.effort import DEFAULT_PRESET, PRESETS, Calibration
from whit.release.card import size
from whit.release.choice import choices, pick
from whit.release.job import RELEASE, Job, Order, Outcome
from whit.release.origin import origin_of
from whit.release.pages import Said, write_pages
from whit.release.push import check_login, push
from whit.release.record import Record, read_records
from whit.release.variants import AUTO, LADDER, Variant, variants_of
from whit.runtime.installed import check_llama
from whit.web.page import write_page
from whit.web.vendor import runtime_files

DEFAULT_WINDOWS = 16
WEB, GGUF = "web", ".gguf"


def command(
    model: Annotated[
        str, typer.Argument(help="A folder, a .gguf file, a hub id or a built-in name; with --pick alone, a release.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder of the release.")] = None,
    variants: Annotated[
        str,
        typer.Option(
            help=f"Names of recipes or JSON files of them, with commas; `{AUTO}` is {', '.join(LADDER)}, as far as the "
            "model allows."
        ),
    ] = AUTO,
    pick_: Annotated[
        str | None, typer.Option("--pick", help="Say which file of a release is best for this much memory, as 8GB.")
    ] = None,
    preset: Annotated[str, typer.Option(help=f"How much work: {', '.join(PRESETS)}.")] = DEFAULT_PRESET,
    calib: Annotated[str | None, typer.Option(help=f"{CALIB_HELP} When not given: the preset's.")] = None,
    calib_windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of 512 tokens to calibrate on, instead of the preset's number.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="What to measure on; by default documentation that ships with Python.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows to measure on.")] = DEFAULT_WINDOWS,
    name: Annotated[str | None, typer.Option(help="What files are called, instead of the model's name.")] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    base_model: Annotated[str | None, typer.Option(help="OWNER/NAME of the original on the hub, for the card.")] = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Do not run GGUF files for tokens per second.")] = False,
    web: Annotated[
        bool,
        typer.Option("--web", help="Add a page, in `web`, that runs the smallest GGUF file in a visitor's browser."),
    ] = False,
    push_: Annotated[
        str | None, typer.Option("--push", help="OWNER/NAME: then upload the release to the hub, as you are logged in.")
    ] = None,
) -> None:
    """Write a publishable set of variants, each measured and verified, with a model card.

    A release that was stopped goes on with the same command. The exit status is 1 when a variant is damaged.
    """
    console = Console(highlight=False, markup=False)
    budget = None if pick_ is None else parse_size(pick_)
    if out is None:
        if budget is None:
            raise RecipeError("Say where the release goes with -o DIR, or ask a finished one with --pick.")
        _print_pick(console, _finished(Path(model)), budget)
        return
    if preset not in PRESETS:
        raise RecipeError(f"There is no preset called {preset!r}. Known presets: {', '.join(PRESETS)}.")
    place, opened = device_named(device), open_model(model)
    origin = origin_of(opened, name, base_model)
    wanted, left_out = variants_of(opened, variants, origin.name)
    if not no_speed and any(each.is_gguf for each in wanted):
        _check_runtime()
    if web:
        _check_web(wanted)
    if push_ is not None:
        check_login(push_)
    measured_on, held_out = measured_windows(opened, text, windows)
    if text is not None:
        measured_on = _named(measured_on, text)
    effort = Calibration(held_out[:0], PRESETS[preset].strength, PRESETS[preset].effort, device=place)

    def calibrate() -> Calibration:
        found = calibration_for(opened, preset, calib, calib_windows, place)
        console.print(f"Calibrating on {found.source}.", soft_wrap=True)
        return found

    asked = _asked(preset, calib, calib_windows)
    order = Order(opened, wanted, out, asked, calibrate, effort, held_out, not no_speed)
    job = Job(order, progress_bar)
    check_place(out, sum(each.n_bytes for each in wanted if not (out / each.file).exists()))
    console.print(f"{origin.name}: {len(wanted)} variants into {out}", soft_wrap=True)
    for line in left_out:
        console.print(f"  left out, {line}", soft_wrap=True)
    outcomes = []
    for each in wanted:
        outcomes.append(job.outcome(each))
        _print_outcome(console, outcomes[-1])
    _check_all(outcomes)
    records = [each.record for each in outcomes]
    said = Said(origin, measured_on, len(held_out), held_out.shape[1], preset, _options(preset, calib, calib_windows))
    remarks = write_pages(job, opened, out, wanted, records, said)
    job.finish()
    if web:
        smallest = min((each for each in records if each.file.endswith(GGUF)), key=lambda each: each.n_bytes)
        with progress_bar("page") as progress:
            write_page(out / smallest.file, out / WEB, origin.name, overwrite=True, progress=progress)
        remarks = [*remarks, f"Try {smallest.file} in a browser: python -m http.server -d {out / WEB}"]
    _print_table(console, records)
    for line in remarks:
        console.print(line, soft_wrap=True)
    console.print(f"Written: {out / 'README.md'} and what it lists.", soft_wrap=True)
    if budget is not None:
        _print_pick(console, records, budget)
    if push_ is not None:
        console.print(f"Pushed: {push(out, push_)}", soft_wrap=True)


def _check_web(variants: Sequence[Variant]) -> None:
    if not any(each.is_gguf for each in variants):
        raise RecipeError("--web wants a GGUF file among the variants; there is none.")
    runtime_files()


def _check_runtime() -> None:
    try:
        check_llama()
    except MissingPackageError as error:
        raise MissingPackageError(f"{error} or leave speeds out with --no-speed.") from None


def _asked(preset: str, calib: str | None, n_windows: int | None) -> str:
    """The calibration in words that differ when the text does."""
    work = PRESETS[preset]
    text = calib or work.text
    path = Path(text)
    content = f", {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else ""
    return f"{n_windows or work.windows} windows of {text}{content}"


def _options(preset: str, calib: str | None, n_windows: int | None) -> list[str]:
    given = {"--preset": preset, "--calib": calib, "--calib-windows": n_windows}
    return [part for option, value in given.items() if value is not None for part in (option, str(value))]


def _named(text: Text, path: Path) -> Text:
    """Without the folders of this machine."""
    return Text(text.name, f"the file {path.name}", text.content)


def _finished(folder: Path) -> list[Record]:
    if not (folder / RELEASE).is_file():
        raise RecipeError(f"{folder}: is no finished release. --pick without -o asks the folder of one.")
    return read_records(folder / RELEASE)[0]


def _print_outcome(console: Console, outcome: Outcome) -> None:
    record, result = outcome.record, outcome.record.result
    speed = "" if record.speed is None else f"; {record.speed:.0f} tokens/s"
    console.print(
        f"{record.file}: {'there already, ' if outcome.kept else ''}{record.n_bytes / 1e6:.1f} MB, {record.word}, KL "
        f"divergence {result.kl_mean:.3g} ± {result.kl_mean_se:.1g}{speed}",
        soft_wrap=True,
    )
    for fault in outcome.faults:
        console.print(f"  fault: {fault}", soft_wrap=True)


def _check_all(outcomes: list[Outcome]) -> None:
    failed = [each.record for each in outcomes if each.failed]
    if failed:
        names = ", ".join(f"{each.file} ({each.word}, KL divergence {each.result.kl_mean:.3g})" for each in failed)
        raise CheckFailedError(
            f"There is no card, because of {names}. whit verify says what is to blame. Leave them out with --variants; "
            "the others are kept."
        )


def _print_table(console: Console, records: list[Record]) -> None:
    chosen = choices(records)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("file", overflow="fold")  # figures are never cut, in a narrow terminal names take two lines
    for title in ("bits", "MB", "RAM, MB", "KL", "same top, %", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in records:
        table.add_row(
            "*" if chosen[each.file].recommended else "",
            each.file,
            f"{each.bits_per_weight:.2f}",
            f"{each.n_bytes / 1e6:.1f}",
            f"{each.ram / 1e6:.0f}",
            f"{each.result.kl_mean:.4f}",
            f"{100 * each.result.same_top:.1f}",
            "-" if each.speed is None else f"{each.speed:.0f}",
        )
    console.print(table)
    console.print("* recommended; bits per weight of the whole file, RAM with its context")


def _print_pick(console: Console, records: list[Record], budget: int) -> None:
    for each in pick(records, budget):
        runtime = "llama.cpp" if each.is_gguf else "vLLM or transformers"
        console.print(
            f"For {runtime} in {budget / 1e9:g} GB: {each.file} ({size(each.ram)} with {each.context} tokens of "
            f"context, KL divergence {each.result.kl_mean:.3g}, {each.word})",
            soft_wrap=True,
        )
