"""`whit tune FILE -o OUT`: training with quantization in the loop; a file in, a file of the same format out."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from whit.checkpoints.atomic import check_folder, check_target, whole_file
from whit.cli.calibration import CALIB_HELP, HELD_OUT, MIXED, calibration_for, calibration_windows, shared_out
from whit.cli.progress import progress_bar
from whit.cli.ranks import DEVICE_HELP
from whit.devices import device_named
from whit.errors import RecipeError
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.effort import DEFAULT_PRESET, PRESETS
from whit.pipeline.folder import write_model
from whit.pipeline.rewrite import check_pair
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.rounding.methods import FLOORED

WINDOWS = 128  # to train on
RESAMPLED = 2  # by the original, of each


def command(
    file: Annotated[str, typer.Argument(help="A GGUF file or a folder of quantized weights, of any tool.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file or folder to write, as large as FILE.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="The original, to be followed: folder, .gguf file, hub id or built-in name."),
    ] = None,
    qat: Annotated[
        str | None,
        typer.Option(help="FILE is the original: quantize it by this recipe, then train it after itself."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help=f"How much work that first quantizing does: {', '.join(PRESETS)}.")
    ] = DEFAULT_PRESET,
    data: Annotated[str, typer.Option(help=CALIB_HELP)] = MIXED,
    windows: Annotated[int, typer.Option(min=4, help="Windows of 512 tokens to train on.")] = WINDOWS,
    resampled: Annotated[
        int,
        typer.Option(
            min=0,
            help="For each of these windows, so many more in which the original draws a quarter of the tokens anew, "
            "where there is one to follow.",
        ),
    ] = RESAMPLED,
    train: Annotated[
        str | None,
        typer.Option(
            help="What moves: `full` (codes, scales, norms), `lora` (codes by low rank), or `scales`. When nothing is "
            "said, `full` with an original to follow, else `scales`."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="With --train lora.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Steps from end to end.")] = 240,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 2,
    block_steps: Annotated[
        int, typer.Option(min=0, help="Steps in every block on its own, before; with a teacher.")
    ] = 480,
    rate: Annotated[float, typer.Option(min=0, help="How far codes move at first, in steps of the grid.")] = 0.03,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after about so many minutes.")] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Less memory, a third more time: blocks are run twice.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the windows.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Train a quantized file further, and write the same format again.

    With a teacher the file learns to predict as the original does, without one to predict the text. Repeat the command
    to go on with a run that was interrupted.
    """
    from whit.tune.files import tune_file  # they import transformers, which takes seconds
    from whit.tune.moving import FULL, SCALES
    from whit.tune.train import Tuning

    console = Console(highlight=False, markup=False)
    if qat is not None and teacher is not None:
        raise RecipeError("With --qat FILE itself is the teacher: leave --teacher out.")
    place, alone = device_named(device), teacher is None and qat is None
    tuning = Tuning(
        train or (SCALES if alone else FULL),
        steps,
        batch,
        block_steps=block_steps,
        rate=rate,
        rank=rank,
        seed=seed,
        minutes=minutes,
        checkpoints=checkpoints,
    )
    original: Model | None
    start: Path | None
    if qat is not None:
        original = open_model(file)
        start = _start(original, qat, preset, out)
        candidate = _quantized(original, qat, preset, start, place)
    else:
        original = None if teacher is None else open_model(teacher)
        start, candidate = None, open_model(file)
    check_pair(original, candidate)
    (check_folder if candidate.gguf_tensors is None else check_target)(out, candidate.n_bytes, force)
    ids, source = calibration_windows(original or candidate, windows + HELD_OUT, data, fresh=True, device=place)
    held_out, trained = shared_out(ids)
    more = _Resampled(original, trained, resampled, seed, out, place) if original is not None and resampled else None
    if more is not None:
        source += f", and {resampled * len(trained)} drawn anew in part"
        trained = torch.cat([trained, more.windows()])
    aim = "following the original" if original is not None else "predicting the text"
    console.print(f"Training on {len(trained)} windows, deciding on {len(held_out)}, {aim}: {source}.", soft_wrap=True)
    with progress_bar("training") as progress:
        found = tune_file(candidate, out, trained, held_out, original, tuning, force, progress, place)
    for path in (start, None if more is None else more.path):
        if path is not None:
            _remove(path)
    measure = "KL" if original is not None else "loss"
    if found.changed:
        console.print(
            f"Trained: {measure} {found.before:.4g} -> {found.after:.4g} (± {found.error:.2g}) on text that was not "
            f"trained on, after {found.blocks} blocks and {found.steps} steps; {found.moved:.1%} of the codes moved; "
            f"{found.seconds:.0f} s.",
            soft_wrap=True,
        )
    else:
        console.print(
            f"Trained in vain: {measure} stayed at {found.before:.4g} on text that was not trained on; the file is "
            f"as it was; {found.seconds:.0f} s.",
            soft_wrap=True,
        )
    against = file if qat is not None else teacher
    console.print(f"Next: whit eval {out}" + (f" --against {against}" if against else ""), soft_wrap=True)


def _start(original: Model, recipe: str, preset: str, out: Path) -> Path:
    """Where the file lies that training begins with, until it is over: another one for whatever makes it another."""
    kind = hashlib.sha256(repr((original.label, original.n_bytes, recipe, preset)).encode()).hexdigest()[:8]
    return out.with_name(f".{out.stem}.{kind}.start{out.suffix}")


def _quantized(original: Model, recipe: str, preset: str, path: Path, device: torch.device) -> Model:
    """The file that training begins with. Raises RecipeError."""
    if preset not in PRESETS:
        raise RecipeError(f"There is no preset called {preset!r}. Known: {', '.join(PRESETS)}.")
    chosen = folder_recipe(recipe, FLOORED) or recipe_named(recipe, FLOORED)
    if not path.exists():
        with progress_bar("quantizing") as progress:
            calibration = calibration_for(original, preset, device=device)
            write_model(original, chosen, path, False, progress, calibration)
    return open_model(str(path))


class _Resampled:
    """Windows that the original has drawn anew in part, beside the output until training is over.

    path  where
    """

    def __init__(self, original: Model, text: Tensor, times: int, seed: int, out: Path, device: torch.device) -> None:
        """text  [n, length] int64"""
        self._original, self._text, self._times, self._seed, self._device = original, text, times, seed, device
        kind = hashlib.sha256(repr((original.label, original.n_bytes, times, seed)).encode())
        kind.update(text.contiguous().numpy().data)
        self.path = out.with_name(f".{out.stem}.{kind.hexdigest()[:8]}.text.safetensors")

    def windows(self) -> Tensor:
        """[times * n, length] int64."""
        from whit.models.sampling import resampled_windows  # it imports transformers, which takes seconds

        if not self.path.exists():
            with progress_bar("writing") as progress:
                ids = resampled_windows(self._original, self._text, self._times, self._seed, progress, self._device)
            with whole_file(self.path, ids.nbytes, True) as file:
                save_file({"tokens": ids.contiguous()}, file.name)
        return load_file(self.path)["tokens"]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
