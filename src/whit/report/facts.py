"""What a report says, before it is a page: facts about an original, files made from it, and what they calibrated on.

Everything that the page, the pictures and the advice show is here, measured once. Texts are as they came; whoever shows
them escapes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from whit.evaluation.divergence import TokenMeasures
from whit.pipeline.verify import Verified


@dataclass(frozen=True)
class Matrix:
    """One matrix of a file beside the original's.

    block      number of its layer, None outside the layers
    role       what it is there, such as "attn_q"; outside the layers its name
    type       name of its grid
    bits       per weight, scales included; not a number where that is not known
    error      root of the squared error over the root of the squared weights
    expected   the same by plain rounding on this grid
    fault      what is wrong with it, empty for nothing
    """

    name: str
    block: int | None
    role: str
    type: str
    bits: float
    n_weights: int
    error: float
    expected: float
    fault: str = ""


@dataclass(frozen=True)
class Said:
    """A greedy continuation of a prompt, beside the original's.

    same      the text before the first difference
    rest      the text from there on, empty without one
    n_same    tokens before the first difference
    n_tokens  written in all
    """

    same: str
    rest: str
    n_same: int
    n_tokens: int


@dataclass(frozen=True)
class Prompt:
    """A beginning, and what the original makes of it."""

    text: str
    original: str


@dataclass(frozen=True)
class FileFacts:
    """One file or folder.

    name             as it is called in the report; no two are alike
    kind             "GGUF", or the method that a folder names
    bits_per_weight  of the whole file, None when it cannot be opened
    origin           what the file says of its making, empty when it says nothing
    calibration      what the file says of its calibration, empty when it says nothing
    matrices         in file order, none when it cannot be read
    tokens           of every scored position, None when it cannot be run
    said             one per prompt, none when it cannot be run
    """

    name: str
    kind: str
    n_bytes: int
    bits_per_weight: float | None
    verified: Verified
    origin: str = ""
    calibration: str = ""
    matrices: tuple[Matrix, ...] = ()
    tokens: TokenMeasures | None = None
    said: tuple[Said, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What a matrix was given while an importance matrix was made.

    tokens  per expert; one number for a matrix that is not of experts
    silent  share of its input columns that were zero throughout (of experts that saw tokens)
    """

    name: str
    tokens: tuple[int, ...]
    silent: float


@dataclass(frozen=True)
class Coverage:
    """An importance matrix beside the model.

    texts    what was read, as the file says
    seen     every matrix of the model that it has
    missing  matrices of the model that it lacks; the embedding of tokens multiplies with nothing and is not asked for
    unknown  entries that name no matrix of the model
    """

    name: str
    texts: tuple[str, ...]
    n_tokens: int
    seen: tuple[Seen, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Everything.

    original       what the files are compared with
    text           what was measured on, in a clause
    files          in the order given
    """

    original: str
    original_bytes: int
    original_bits: float
    text: str
    n_windows: int
    window_tokens: int
    files: tuple[FileFacts, ...]
    prompts: tuple[Prompt, ...] = ()
    coverage: Coverage | None = None
    version: str = ""
    seconds: float = field(default=0.0, compare=False)


def by_size(files: Sequence[FileFacts]) -> list[FileFacts]:
    """From small to large."""
    return sorted(files, key=lambda each: each.n_bytes)
