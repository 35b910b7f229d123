"""`whit imatrix MODEL -o FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from whit.checkpoints.atomic import check_target
from whit.checkpoints.imatrix import write_imatrix
from whit.cli.calibration import CALIB_HELP, MIXED, calibration_windows
from whit.cli.progress import progress_bar
from whit.cli.ranks import DEVICE_HELP
from whit.devices import device_named
from whit.models.open import open_model
from whit.pipeline.effort import DEFAULT_PRESET, PRESETS
from whit.pipeline.quantize import gather_importance


def command(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id or a built-in name (smollm2-135m).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .gguf file, or .dat for older versions of llama.cpp.")],
    calib: Annotated[str, typer.Option(help=CALIB_HELP)] = MIXED,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens.")] = PRESETS[DEFAULT_PRESET].windows,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write how large the inputs of every matrix are: an importance matrix, as llama.cpp's tools read it."""
    console = Console(highlight=False, markup=False)
    place, opened = device_named(device), open_model(model)
    check_target(out, 0, force)  # before any work
    ids, source = calibration_windows(opened, windows, calib, device=place)
    console.print(f"Calibrating on {source}.", soft_wrap=True)
    with progress_bar("importance matrix") as progress:
        matrix = gather_importance(opened, ids, source, progress, place)
    write_imatrix(matrix, out, overwrite=force)
    console.print(f"{out}: {len(matrix.means)} matrices, {ids.numel():,} tokens", soft_wrap=True)
    console.print(f"Next: whit quantize {model} --recipe iq4_xs --imatrix {out} -o small.gguf", soft_wrap=True)
