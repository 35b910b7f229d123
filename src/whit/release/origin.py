"""Where a model comes from, as far as it says so: its name for people, its page on the hub, its license."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from whit.checkpoints.hub import looks_like_hub_id
from whit.errors import RecipeError
from whit.models.builtin import BUILTIN, PUBLISHED
from whit.models.model import Model

CARD = "README.md"
MOST = 1 << 20  # bytes of a card that are looked at
LONGEST = 80  # letters of a name


@dataclass(frozen=True)
class Origin:
    """What a release says of its source; what is not known is empty.

    name      what files are called: letters, digits and . _ + - alone
    base      hub id of the original
    license   as the source says
    label     what the person who made the release typed; of a path, the last part: the others are nobody's business
    """

    name: str
    base: str
    license: str
    label: str


def origin_of(model: Model, name: str | None = None, base: str | None = None) -> Origin:
    """What is known of an opened model.

    name, base  what the user says, in place of what the model does
    Raises RecipeError for a base that is no hub id and a name without a single letter that a file name may have.
    """
    if base is not None and not looks_like_hub_id(base):
        raise RecipeError(f"--base-model {base!r} is not a hub id. Write OWNER/NAME.")
    source = PUBLISHED.get(model.label, "") if model.label in BUILTIN else ""
    on_hub = looks_like_hub_id(model.label) and model.gguf_path is None and not Path(model.label).exists()
    source = source or (model.label if on_hub else "")
    config_name = str(model.config.get("_name_or_path") or "")
    if not source and looks_like_hub_id(config_name) and not Path(config_name).exists():
        source = config_name
    said = _front_matter(model.tokenizer_dir)
    license_ = said.get("license") or model.gguf_metadata.get("general.license") or ""
    label = Path(model.label).resolve().name if Path(model.label).exists() else model.label
    last = Path(source or label).name
    wanted = name or (last.removesuffix(".gguf") if last.endswith(".gguf") else last)
    return Origin(_file_name(wanted), base or source, license_ if isinstance(license_, str) else "", label)


def _file_name(text: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip(".-")[:LONGEST]
    if not cleaned:
        raise RecipeError(f"{text!r} makes no file name. Give one with --name.")
    return cleaned


def _front_matter(folder: Path | None) -> Mapping[str, Any]:
    """The YAML between the first two lines of dashes of a folder's card; empty when there is none that can be read."""
    path = None if folder is None else folder / CARD
    if path is None or not path.is_file():
        return {}
    with path.open("rb") as file:
        text = file.read(MOST).decode("utf-8", "replace")
    found = re.match(r"---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
    try:
        content = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):  # a card that cannot be read says nothing
        content = None
    return content if isinstance(content, dict) else {}
