"""The commands, options and imports that pages show, read from their Markdown.

A page shows commands in three ways, and each is read by its own rule:

    an indented block     `whit quantize MODEL --fit 4GB -o small.gguf   # what it does`: lines to copy
    a console block       `$ whit inspect small.gguf` and what it printed; only manual/examples.py writes these
    a span in a sentence  `--fit`, `whit plan --predict`: names, with or without values

Nothing is run. Words in capitals stand for something of the reader's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
CONSOLE = "console"
PROMPT = "$ "
_OPTION = re.compile(r"(?<![\w-])(?:--[a-z][\w-]*|-[a-z](?![\w-]))")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_SYNOPSIS = re.compile(r"[\[\]]|\S\|\S|\.\.\.")  # optional parts, alternatives: `whit eval FILE [--json]`
_REMARK = re.compile(r"\s{2,}[^-\s'\"].*$")  # a remark beside a command without a `#`, two spaces or more away


@dataclass(frozen=True)
class Shown:
    """A piece of a page: where it is (`docs/gpu.md:3`), the language of its block ("" without one), and its text."""

    where: str
    language: str
    text: str


def pages() -> list[Path]:
    """Every page that people read, the README first."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> Iterator[Shown]:
    """The page's blocks of code."""
    for token in _tokens(page):
        if token.type in ("code_block", "fence"):
            yield Shown(_where(page, token), token.info.split(" ")[0], token.content)


def spans(page: Path) -> Iterator[Shown]:
    """The page's code within sentences."""
    for token in _tokens(page):
        for child in token.children or ():
            if child.type == "code_inline":
                yield Shown(_where(page, token), "", child.content)


def command_lines(block: Shown) -> list[str]:
    """The commands of a block, one line each, without prompts and remarks."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == CONSOLE:
        lines = [line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)]
    return [line for line in lines if line.startswith(("whit ", "make ", "pip ", "python -m "))]


def words(line: str) -> list[str]:
    """The arguments of a command line as a shell hands them over: without comments, pipes and redirections.

    Raises ValueError for a line whose quotes do not close.
    """
    found = shlex.split(line, comments=True)
    ends = [i for i, word in enumerate(found) if word in ("|", "&&", "&", ";") or word.startswith((">", "2>"))]
    return found[1 : min(ends, default=len(found))]


def is_synopsis(line: str) -> bool:
    """Whether a line says what may be typed rather than what to type."""
    return bool(_SYNOPSIS.search(_QUOTED.sub("", line.partition(" #")[0])))


def without_remark(line: str) -> str:
    """The line without words that stand beside it, far to the right."""
    return _REMARK.sub("", line)


def option_names(text: str) -> list[str]:
    """The options that a text names, such as `--fit` and `-o`."""
    return _OPTION.findall(text.partition(" # ")[0])


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def _where(page: Path, token: Token) -> str:
    line = token.map[0] + 1 if token.map else 1
    return f"{page.relative_to(ROOT)}:{line}"
