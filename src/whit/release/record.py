"""What is known of a finished variant: its bytes, what it lost, how fast it is. Kept as JSON, read with suspicion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from whit.checkpoints.atomic import whole_file
from whit.errors import BrokenFileError
from whit.evaluation.divergence import Comparison

CHUNK = 1 << 20
KEY = "variants"


@dataclass(frozen=True)
class Record:
    """One variant.

    name, file         as in Variant
    recipe             its name
    digest             of the recipe, rule by rule: what has another digest is another variant
    kind               gguf, or the layout of a folder
    n_bytes            of its weight files
    bits_per_weight    of these files
    ram                bytes to run it at `context` tokens
    word               the verdict, `near` the other word that is possible
    result             beside the original
    speed              tokens per second, None when it was not measured; `machine` is where, else empty
    checksums          SHA-256 by path within the release
    """

    name: str
    file: str
    recipe: str
    digest: str
    kind: str
    n_bytes: int
    bits_per_weight: float
    ram: float
    context: int
    word: str
    near: str
    result: Comparison
    speed: float | None
    machine: str
    checksums: Mapping[str, str]

    @property
    def is_gguf(self) -> bool:
        """A file for llama.cpp, rather than a folder for GPUs."""
        return self.kind == "gguf"

    def holds(self, folder: Path) -> bool:
        """Whether the files are there, with the right checksums. Reads them whole."""
        return bool(self.checksums) and checksums(folder, folder / self.file) == dict(self.checksums)


def checksums(folder: Path, path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of all files of a folder, by their names within the release `folder`; none if not there."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return {each.relative_to(folder).as_posix(): _digest(each) for each in files if each.is_file()}


def write_records(records: Sequence[Record], path: Path, said: Mapping[str, Any]) -> None:
    """Write records as JSON, with whatever else is to be said. Raises OutputError."""
    content = {**said, KEY: [asdict(each) for each in records]}
    raw = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    with whole_file(path, len(raw), overwrite=True) as file:
        file.write(raw)


def read_records(path: Path) -> tuple[list[Record], dict[str, Any]]:
    """What `write_records` wrote. Raises BrokenFileError for any other content."""
    try:
        content = json.loads(path.read_bytes())
        records = [_record(each) for each in content.pop(KEY)]
    except OSError as error:
        raise BrokenFileError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BrokenFileError(f"{path}: is not what `whit release` writes ({error}).") from error
    return records, content


def _record(content: dict[str, Any]) -> Record:
    if set(content) != {each.name for each in fields(Record)}:
        raise ValueError("other entries than those of a variant")
    result = Comparison(**content.pop("result"))
    paths = content["checksums"]
    if any(path.startswith("/") or ".." in Path(path).parts for path in (content["file"], *paths)):
        raise ValueError("a path outside of the release")
    numbers = (content["n_bytes"], content["bits_per_weight"], content["ram"], result.kl_mean)
    if not all(isinstance(each, int | float) for each in numbers):
        raise ValueError("a text where a number should be")
    return Record(result=result, **content)


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            found.update(piece)
    return found.hexdigest()
