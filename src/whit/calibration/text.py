"""Text to measure on, and how it is cut into windows.

A measurement needs a text that nobody calibrated or tuned on. When none is given, Whit takes documentation that every
CPython carries: the language reference (`pydoc_data.topics`) and the docstrings of the standard library, read from
its source files without importing anything. Every topic and module belongs to one of two parts by a hash of its
name, so that calibration can use the one and measuring the other, on any machine and for good.

The text differs between versions of Python: numbers are comparable only under the same one, and its name says which.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from whit.errors import TextError

Part = Literal["held-out", "calibration"]

WINDOW = 512  # tokens
PER_TOKEN = 8  # characters; no usual text has more, on average
TOGETHER = 64  # windows that a model writes side by side
SHORTEST_DOCSTRING = 200  # characters; shorter ones are mostly a name said again
SHORTEST_REPEATED = 60  # characters; shorter paragraphs ("For example:") may occur again


@dataclass(frozen=True)
class Text:
    """A text and where it is from.

    name         short, for tables and file names
    description  one clause for a reader of the result
    content      the text itself
    """

    name: str
    description: str
    content: str


def documentation_text(part: Part) -> Text:
    """One of the two disjoint halves of Python's own documentation.

    part  "held-out" for measuring, "calibration" for everything that adapts to a text
    Raises TextError when this Python was installed without its standard library's source.
    """
    pieces = [piece for name, piece in _documents() if _part_of(name) == part]
    if not pieces:
        raise TextError("This Python was installed without its documentation; give a text file with --text.")
    version = platform.python_version()
    return Text(
        f"python-docs-{version}-{part}",
        f"{part} half of the documentation that ships with Python {version}",
        "\n\n".join(pieces) + "\n",
    )


def default_text() -> Text:
    """What is measured on when no text is given."""
    return documentation_text("held-out")


def read_text(path: Path) -> Text:
    """A text file in UTF-8. Raises TextError when it is missing, unreadable or not text."""
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror}). Give the path of a text file.") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text (byte {error.start}). Convert it: iconv -t UTF-8.") from error
    return Text(path.name, f"the file {path}", content)


def windows(ids: Sequence[int] | Tensor, length: int = WINDOW, limit: int | None = None) -> Tensor:
    """Cut a text into windows that do not overlap; what is left at the end is dropped.

    ids     [tokens] integers        the whole text, no special tokens added
    length  tokens per window
    limit   at most so many windows, from the start; None for all
    Returns [windows, length] int64. Raises TextError when the text is shorter than one window.
    """
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {length}")
    if limit is not None and limit < 1:
        raise TextError(f"{limit} windows cannot be scored; ask for 1 or more.")
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    n_windows = tokens.numel() // length
    if n_windows == 0:
        raise TextError(
            f"The text is too short to score: it has {tokens.numel()} tokens, one window takes {length}. "
            "Give a longer text, or none to use Python's documentation."
        )
    n_windows = n_windows if limit is None else min(n_windows, limit)
    return tokens[: n_windows * length].view(n_windows, length)  # [windows, length]


def first_windows(text: Text, encode: Callable[[str], Sequence[int] | Tensor], length: int, n: int) -> Tensor:
    """At most n windows [n, length] int64 from the start of a text.

    encode  text -> token ids; it is given no more than is needed, because encoding takes longer than reading
    Raises TextError as `windows` does.
    """
    return windows(encode(text.content[: n * length * PER_TOKEN]), length, n)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _part_of(name: str) -> Part:
    return "held-out" if _digest(name)[-1] % 2 == 0 else "calibration"


@cache  # seconds of parsing, and most commands calibrate on one half and measure on the other
def _documents() -> tuple[tuple[str, str], ...]:
    """(name, text) of every topic of the language reference and every module at the top of the library.

    In the order of a hash of their names: a measurement on the first windows of the text then sees all kinds.
    """
    return tuple(_found())


def _found() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = {f"topic {name}": [topic.strip()] for name, topic in _topics(root / "pydoc_data" / "topics.py").items()}
    for path in root.glob("*.py"):
        documents[f"module {path.name}"] = [text for text in _docstrings(path) if len(text) >= SHORTEST_DOCSTRING]
    # Topics quote each other and modules mirror each other; every paragraph stays with the first that has it, so that
    # nothing is on both sides.
    seen: set[str] = set()
    for name in sorted(documents, key=_digest):
        paragraphs = "\n\n".join(documents[name]).split("\n\n")
        fresh = [paragraph for paragraph in paragraphs if paragraph.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in fresh if len(paragraph.strip()) >= SHORTEST_REPEATED)
        if fresh:
            yield name, "\n\n".join(fresh)


def _topics(path: Path) -> dict[str, str]:
    tree = _parsed(path)
    literals = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    ]
    return ast.literal_eval(literals[0]) if literals else {}


def _docstrings(path: Path) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in _statements(_parsed(path)) if isinstance(node, documented))
    return [text.strip() for text in found if text]


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """As `ast.walk`, in its order, without what is below a statement's expressions: nothing documented is there."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            below = getattr(node, name, None)
            if isinstance(below, list):  # not a lambda's or a conditional expression's
                waiting.extend(below)


def _parsed(path: Path) -> ast.Module:
    """The syntax tree of a source file; an empty one for files that are absent or, in some version, not valid."""
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])
