"""The calibration text of a command: `--calib` and `--windows` become windows of token ids."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from whit.calibration.text import TOGETHER, WINDOW, documentation_text, read_text
from whit.calibration.text import Text as Content
from whit.calibration.text import windows as cut
from whit.checkpoints.hub import looks_like_hub_id
from whit.cli.progress import progress_bar
from whit.devices import CPU
from whit.errors import TextError
from whit.models.model import Model
from whit.pipeline.counts import Text
from whit.pipeline.effort import PRESETS, Calibration
from whit.pipeline.quantize import plan_gguf
from whit.recipes.named import recipe_named

DOCUMENTATION, SAMPLED, MIXED, HUB = "docs", "sampled", "mixed", "hf:"
DOCUMENTATION_CHARACTERS = 432_000  # of the half that is calibrated on; versions of Python differ little
HELD_OUT = 8  # windows to decide on
CALIB_HELP = (
    "What to calibrate on: a text file, `docs` (documentation that ships with Python), `sampled` (text that the model "
    "writes itself), `mixed` (half and half), `hf:OWNER/NAME` or `hf:OWNER/NAME/FILE` (a data set on the hub)."
)


def calibration_windows(
    model: Model,
    n_windows: int,
    calib: str = DOCUMENTATION,
    most: int | None = None,
    fresh: bool = False,
    device: torch.device = CPU,
) -> tuple[Tensor, str]:
    """Token ids [n, length] int64 and what they are.

    calib  as in CALIB_HELP
    most   tokens per window at most; the model's context is a limit too
    fresh  from the end of the text, and sampled with another seed: not what is read without it, if the text is long
    device  where the model writes
    Raises TextError when the text cannot be had or is too short for one window.
    """
    length = min(most or WINDOW, longest(model))
    if calib == MIXED:
        n_sampled = n_windows // 2
        first, source = calibration_windows(model, n_windows - n_sampled, DOCUMENTATION, most, fresh)
        if not n_sampled:
            return first, source
        second, other = calibration_windows(model, n_sampled, SAMPLED, most, fresh, device)
        return torch.cat([first, second]), f"{source}, and {other}"
    if calib == SAMPLED:
        from whit.models.sampling import sampled_windows  # it imports transformers, which takes seconds

        with progress_bar("sampling") as progress:
            ids = sampled_windows(model, n_windows, length, int(fresh), progress, device)
        return ids, f"{n_windows} windows of {length} tokens sampled from the model itself"
    from whit.models.tokenizer import load_tokenizer

    text = _text(calib)
    ids = cut(load_tokenizer(model).encode(text.content), length)
    ids = ids[-n_windows:] if fresh else ids[:n_windows]
    short = f" (the text has no more; {n_windows} were wanted)" if len(ids) < n_windows else ""
    return ids, f"{len(ids)} windows of {length} tokens{short}: {text.description}"


def calibration_for(
    model: Model, preset: str, calib: str | None = None, n_windows: int | None = None, device: torch.device = CPU
) -> Calibration:
    """A preset's effort on a text. calib, n_windows: the preset's when None. device: where the model runs."""
    work = PRESETS[preset]
    ids, source = calibration_windows(model, n_windows or work.windows, calib or work.text, device=device)
    return Calibration(ids, work.strength, work.effort, source, device=device)


def planned_text(model: Model, preset: str, calib: str | None = None, n_windows: int | None = None) -> Text:
    """What `calibration_for` would read and sample; a data set on the hub is fetched in a time that nobody knows."""
    work = PRESETS[preset]
    calib, windows, length = calib or work.text, n_windows or work.windows, min(WINDOW, longest(model))
    n = windows if calib == SAMPLED else windows // 2 if calib == MIXED else 0
    sizes = tuple(min(TOGETHER, n - done) for done in range(0, n, TOGETHER))
    documents = calib in (DOCUMENTATION, MIXED)
    characters = DOCUMENTATION_CHARACTERS if documents else 0
    if not documents and calib != SAMPLED and not calib.startswith(HUB):
        characters = len(read_text(Path(calib)).content)
    return Text(windows, length, sizes, characters, documents)


def shared_out(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [n, length] to decide on, evenly spread, and the rest to train on.

    Raises TextError when there are too few.
    """
    n = min(HELD_OUT, len(ids) // 4)
    if n == 0:
        raise TextError(
            f"{len(ids)} windows are too few to keep some apart: at least 4 are needed. Give a longer text."
        )
    held = torch.zeros(len(ids), dtype=torch.bool)
    held[torch.linspace(0, len(ids) - 1, n + 2).round().long()[1:-1]] = True
    return ids[held], ids[~held]


def longest(model: Model) -> int:
    """Tokens that the model reads at once."""
    metadata = plan_gguf(model, recipe_named("f32")).metadata
    return int(metadata.get(f"{metadata['general.architecture']}.context_length", WINDOW))


def _text(calib: str) -> Content:
    if calib == DOCUMENTATION:
        return documentation_text("calibration")
    if calib.startswith(HUB):
        from whit.calibration.hub_text import hub_text

        return hub_text(calib.removeprefix(HUB))
    path = Path(calib)
    if not path.exists() and looks_like_hub_id(calib):
        raise TextError(f"{calib}: no such file. For a data set on the hub write {HUB}{calib}.")
    return read_text(path)
