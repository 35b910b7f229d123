"""`whit distil FILE --against ORIGINAL -o OUT`, and what `--distil` of `whit quantize` does after rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from whit.checkpoints.atomic import check_folder, check_target
from whit.cli.calibration import CALIB_HELP, HELD_OUT, MIXED, calibration_windows, shared_out
from whit.cli.progress import progress_bar
from whit.cli.ranks import DEVICE_HELP
from whit.devices import device_named
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.distil import Distilled, Training, check_pair, distil_folder, distil_gguf

STEPS = 100
WINDOWS = 64  # to train on


def command(
    file: Annotated[str, typer.Argument(help="A GGUF file or a folder of quantized weights, of any tool.")],
    against: Annotated[str, typer.Option(help="The original: folder, .gguf file, hub id or built-in name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file or folder to write, as large as FILE.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam, two windows each.")] = STEPS,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after about so many minutes.")] = None,
    calib: Annotated[str, typer.Option(help=CALIB_HELP)] = MIXED,
    windows: Annotated[int, typer.Option(min=2, help="Windows of 512 tokens to train on.")] = WINDOWS,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Improve the scales and norms of a quantized file; its codes and its size stay as they are."""
    console = Console(highlight=False, markup=False)
    place, original, candidate = device_named(device), open_model(against), open_model(file)
    check_pair(original, candidate)
    (check_folder if candidate.gguf_tensors is None else check_target)(out, candidate.n_bytes, force)
    held_out, train = texts(console, original, calib, place, windows)
    write(console, original, candidate, out, held_out, train, steps, minutes, force, place)
    console.print(f"Next: whit eval {out} --against {against}", soft_wrap=True)


def texts(
    console: Console, original: Model, calib: str | None, device: torch.device, windows: int = WINDOWS
) -> tuple[Tensor, Tensor]:
    """Windows to decide on and to train on. Raises TextError when there are too few."""
    ids, source = calibration_windows(original, windows + HELD_OUT, calib or MIXED, fresh=True, device=device)
    held_out, train = shared_out(ids)
    console.print(f"Distilling on {len(train)} windows, deciding on {len(held_out)}: {source}.", soft_wrap=True)
    return held_out, train


def write(
    console: Console,
    original: Model,
    candidate: Model,
    out: Path,
    held_out: Tensor,
    train: Tensor,
    steps: int,
    minutes: float | None,
    force: bool,
    device: torch.device,
) -> None:
    """Distil a file into another and say what came of it."""
    training = Training(steps, minutes=minutes)
    with progress_bar("distilling") as progress:
        run = distil_folder if candidate.gguf_tensors is None else distil_gguf
        found = run(original, candidate, out, train, held_out, training, force, progress, device)
    print_distilled(console, found)


def print_distilled(console: Console, found: Distilled) -> None:
    """What came of it."""
    if found.steps:
        console.print(
            f"Distilled: KL {found.before:.4g} -> {found.after:.4g} (± {found.error:.2g}) on text that was not trained "
            f"on, after {found.steps} steps; {found.seconds:.0f} s.",
            soft_wrap=True,
        )
    else:
        console.print(
            f"Distilled in vain: KL stayed at {found.before:.4g} on text that was not trained on; the file keeps its "
            f"scales; {found.seconds:.0f} s.",
            soft_wrap=True,
        )
