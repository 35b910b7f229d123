"""The text that a command measures on: `--text` and `--windows` become windows of token ids."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from whit.calibration.text import WINDOW, Text, default_text, first_windows, read_text
from whit.cli.calibration import longest
from whit.models.model import Model
from whit.models.tokenizer import load_tokenizer

DEFAULT_WINDOWS = 6


def measured_windows(model: Model, path: Path | None, n_windows: int) -> tuple[Text, Tensor]:
    """A text and its first windows [n, length] int64, as long as the model reads, WINDOW at most.

    path  of the text; None for held-out documentation
    Raises TextError when it cannot be had or is too short for one window.
    """
    text = default_text() if path is None else read_text(path)
    return text, first_windows(text, load_tokenizer(model).encode, min(WINDOW, longest(model)), n_windows)
