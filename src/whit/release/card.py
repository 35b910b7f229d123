"""The model card: README.md of a release, with front matter as the hub reads it.

Names, licenses and templates come from models of strangers. Everything that the template prints is escaped for
Markdown unless it says otherwise, and the front matter is made by a YAML library of text on one line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, StrictUndefined

from whit.release.choice import Choice
from whit.release.origin import Origin
from whit.release.record import Record

TEMPLATE = "card.md.jinja"
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~#&!])")
_PLAIN_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


class Raw(str):
    """Markdown already."""


def render(values: Mapping[str, Any]) -> str:
    """The card. values: everything that the template names. Raises jinja2's UndefinedError when one is missing."""
    environment = Environment(
        undefined=StrictUndefined, finalize=_escaped, autoescape=False, keep_trailing_newline=True, trim_blocks=False
    )
    environment.filters |= {"code": code, "path": _path, "fenced": _fenced, "raw": Raw}
    text = files("whit.release").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text).render(values)


def front_matter(origin: Origin, records: Sequence[Record], talks: bool) -> Raw:
    """What the hub reads of a card. talks: whether the model has a chat template."""
    kinds = list(dict.fromkeys(each.kind for each in records))
    content: dict[str, Any] = {}
    if origin.base:
        content |= {"base_model": origin.base, "base_model_relation": "quantized"}
    license_ = one_line(origin.license)
    if _PLAIN_LICENSE.fullmatch(license_):
        content["license"] = license_
    elif license_:
        content |= {"license": "other", "license_name": license_}
    content |= {
        "library_name": "gguf" if "gguf" in kinds else "transformers",
        "pipeline_tag": "text-generation",
        "quantized_by": "Whit",
        "tags": ["whit", "quantized", *kinds, *(["conversational"] if talks else [])],
    }
    return Raw(f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)}---")


def row(record: Record, choice: Choice) -> dict[str, Any]:
    """A line of the table."""
    result = record.result
    return {
        "file": record.file,
        "recipe": record.recipe,
        "bits": f"{record.bits_per_weight:.2f}",
        "size": size(record.n_bytes),
        "ram": size(record.ram),
        "kl": f"{result.kl_mean:.2g} ± {result.kl_mean_se:.1g}",
        "top": f"{100 * result.same_top:.1f} %",
        "perplexity": f"{result.perplexity_ratio:.3f}×",
        "speed": "" if record.speed is None else f"{record.speed:.0f}",
        "choice": choice,
    }


def size(n_bytes: float) -> str:
    """0.12 MB, 105 MB, 4.70 GB."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.{0 if n_bytes >= 1e7 else 2}f} MB"


def one_line(text: str) -> str:
    """Without control characters and line breaks."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def code(text: str, table: bool = False) -> Raw:
    """Text in a code span; within a table a bar would end the cell, elsewhere its backslash would be seen."""
    text = one_line(text)
    if table:
        text = text.replace("|", r"\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return Raw(f"{ticks}{space}{text}{space}{ticks}" if text else "")


def _escaped(value: Any) -> Any:
    return value if isinstance(value, Raw) or not isinstance(value, str) else _SPECIAL.sub(r"\\\1", one_line(value))


def _path(text: str) -> Raw:
    return Raw(quote(text))


def _fenced(text: str) -> Raw:
    """A block of code with a fence that the text does not hold, without control characters."""
    text = "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Raw(f"{ticks}text\n{text.rstrip()}\n{ticks}")
