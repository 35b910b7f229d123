"""A static folder that runs a GGUF file in the visitor's browser, through llama.cpp compiled to WebAssembly.

    index.html, style.css, page.js, model.js, download.js    the page
    isolate.js, headers.js    a service worker that asks the browser for threads, where a host sends no headers
    page.json                 which file is which, for the script
    wllama.js, compat.js, NAME-HASH.wasm    the runtime (whit.web.vendor): of its two builds a browser loads one
    NAME-HASH.gguf            the model, or its parts .gguf.01, .gguf.02, ...

Any host of static files will do. Nothing is loaded from anywhere else, and a Content-Security-Policy sees to it.

A large file is cut into plain pieces, not into GGUF files of their own: the page joins them as a Blob, which a browser
keeps on disk and reads in slices, so that no buffer's limit matters and a broken download repeats one piece. The pieces
are small enough for GitHub. Their names hold the content's hash: what a browser has kept can never be out of date.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
from jinja2 import Environment, FileSystemLoader

from whit.checkpoints.atomic import whole_folder
from whit.checkpoints.gguf import GGUFFile
from whit.errors import ModelError, RecipeError
from whit.web.vendor import runtime_files

STATIC = Path(__file__).parent / "static"
TEMPLATE = "index.html"
PART_BYTES = 95_000_000  # GitHub takes files of at most 100 MiB
MOST_BYTES = 3_700_000_000  # a page's memory ends at 4 GiB; keys, values and buffers need the rest
BUILDS = {"wllama.wasm": "usual", "compat.wasm": "compat"}
CONTEXT = 4096  # tokens, of conversation and answer together
COPIED = 1 << 24  # bytes at a time

Report = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being written


@dataclass(frozen=True)
class Part:
    """A large file, or a piece of one: its name beside the page, and its bytes."""

    file: str
    bytes: int


@dataclass(frozen=True)
class Page:
    """What was written.

    title    of the page
    parts    of the model, in order
    n_bytes  of the whole folder
    chat     whether the file says how a conversation is written down; without, the page continues texts
    context  tokens of conversation and answer together
    """

    folder: Path
    title: str
    parts: tuple[Part, ...]
    n_bytes: int
    chat: bool
    context: int


def write_page(
    model: Path,
    folder: Path,
    title: str = "",
    about: str = "",
    context: int = CONTEXT,
    overwrite: bool = False,
    progress: Report = lambda done, total, what: None,
) -> Page:
    """Write a folder that answers prompts in a browser with the model of a GGUF file.

    title      of the page; by default the model's own name
    about      a sentence under the title, plain text
    context    tokens of conversation and answer together; at most what the model reads
    overwrite  whether an earlier page may be replaced
    The folder appears whole, or not at all. Raises MissingPackageError without the browsers' runtime, RecipeError for
    a model that no browser holds, ModelError for one without a tokenizer, and what GGUFFile and whole_folder raise.
    """
    runtime = runtime_files()
    file = GGUFFile(model)
    _check(file, context)
    title = title or str(file.metadata.get("general.name") or model.stem)
    static = [path for path in sorted(STATIC.iterdir()) if path.name != TEMPLATE]
    small = sum(path.stat().st_size for path in [*runtime, *static])
    with whole_folder(folder, small + file.n_bytes, overwrite) as inside:
        builds = {}
        for path in [*runtime, *static]:
            name = _named_by_content(path, ".wasm") if path.suffix == ".wasm" else path.name
            shutil.copyfile(path, inside / name)
            if path.name in BUILDS:
                builds[BUILDS[path.name]] = Part(name, path.stat().st_size)
        parts = tuple(_write_parts(file, inside, progress))
        known = Page(folder, title, parts, 0, "tokenizer.chat_template" in file.metadata, _context(file, context))
        (inside / "page.json").write_text(_for_the_script(known, builds), encoding="utf-8")
        (inside / TEMPLATE).write_text(_html(known, about, facts(file)), encoding="utf-8")
        n_bytes = sum(path.stat().st_size for path in inside.iterdir())
    return Page(folder, title, parts, n_bytes, known.chat, known.context)


def facts(file: GGUFFile) -> dict[str, str]:
    """What a visitor may want to know of a model, by label; what the file does not say is left out."""
    infos = [file.info(name) for name in file.names()]
    n_weights = sum(math.prod(info.shape) for info in infos)
    values = {
        "Parameters": _short(n_weights),
        "Type": _type(file.metadata),
        "Bits per weight": f"{8 * file.n_bytes / max(1, n_weights):.1f}",
        "Download": megabytes(file.n_bytes),
        "Licence": str(file.metadata.get("general.license") or ""),
    }
    return {label: value for label, value in values.items() if value}


def megabytes(n_bytes: int) -> str:
    """Decimal, with two or three digits: 88 MB, 2.1 GB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.{0 if n_bytes >= 1e7 else 1}f} MB"


def _check(file: GGUFFile, context: int) -> None:
    if context < 1:
        raise RecipeError(f"A context of {context} tokens holds nothing; ask for 1 or more.")
    if "tokenizer.ggml.model" not in file.metadata:
        raise ModelError(f"{file.path}: has no tokenizer, so that no text can be put in. Give a file that has one.")
    if file.n_bytes > MOST_BYTES:
        raise RecipeError(
            f"{file.path}: {megabytes(file.n_bytes)} do not fit in a web page, whose memory ends at 4 GiB. Give a "
            f"smaller variant, of at most {megabytes(MOST_BYTES)}: whit quantize MODEL --fit 3.5GB"
        )


def _context(file: GGUFFile, wanted: int) -> int:
    longest = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length", wanted)
    return min(wanted, int(longest))


def _type(metadata: dict[str, Any]) -> str:
    try:
        return gguf.LlamaFileType(metadata["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):  # not said, or newer than the list
        return ""


def _short(n: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return f"{n:,}"


def _write_parts(file: GGUFFile, folder: Path, progress: Report) -> Iterator[Part]:
    name = _named_by_content(file.path, ".gguf")
    with file.path.open("rb") as source:
        n_parts = -(-file.n_bytes // PART_BYTES)
        for number in range(n_parts):
            part = Part(
                name if n_parts == 1 else f"{name}.{number + 1:02}",
                min(PART_BYTES, file.n_bytes - number * PART_BYTES),
            )
            with (folder / part.file).open("wb") as out:
                left = part.bytes
                while left:
                    progress(source.tell(), file.n_bytes, part.file)
                    piece = source.read(min(COPIED, left))
                    if not piece:
                        raise ModelError(f"{file.path}: became shorter while it was read. Is it still being written?")
                    out.write(piece)
                    left -= len(piece)
            yield part


def _named_by_content(path: Path, suffix: str) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', path.stem)}-{digest}{suffix}"


def _for_the_script(page: Page, builds: Mapping[str, Part]) -> str:
    values = {
        "runtime": {name: asdict(part) for name, part in builds.items()},
        "parts": [asdict(part) for part in page.parts],
        "chat": page.chat,
        "context": page.context,
    }
    return json.dumps(values, indent=1)


def _html(page: Page, about: str, told: dict[str, str]) -> str:
    environment = Environment(loader=FileSystemLoader(STATIC), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    size = megabytes(sum(part.bytes for part in page.parts))
    return environment.get_template(TEMPLATE).render(page=page, about=about, facts=told, size=size)
