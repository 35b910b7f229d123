"""The text of a data set on the hub: `owner/name` or `owner/name/path/in/it`, files of text, JSON lines or Parquet.

Files are read as data; no loading script of a data set is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from whit.calibration.text import Text, read_text
from whit.errors import MissingPackageError, TextError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".md")
FIELDS = ("text", "content", "document", "prompt")
MOST = 20_000_000  # characters; calibration never reads more


def hub_text(name: str) -> Text:
    """The text of a data set.

    name  `owner/name`, whose first file with a training split's name is taken, or with the path of a file after it
    Raises TextError when there is none, or the hub cannot be reached; MissingPackageError for Parquet without pyarrow.
    """
    owner, repository, *rest = name.split("/")
    repo = f"{owner}/{repository}"
    try:
        path = "/".join(rest) or _first(huggingface_hub.list_repo_files(repo, repo_type="dataset"), repo)
        local = Path(huggingface_hub.hf_hub_download(repo, path, repo_type="dataset"))
    except RepositoryNotFoundError:
        raise TextError(f"{repo}: no such data set on the hub, or it is private. Check the name.") from None
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise TextError(
            f"{repo}: the hub cannot be reached for this data set ({reason}). Give a text file, or leave --calib away "
            "to use what needs no network."
        ) from None
    content = "\n\n".join(_documents(local))[:MOST]
    if not content.strip():
        raise TextError(f"{repo}: {path} holds no text. Its records need one of the fields {', '.join(FIELDS)}.")
    return Text(f"{repo}/{path}", f"{path} of the hub data set {repo}", content)


def _first(files: list[str], repo: str) -> str:
    usable = sorted(file for file in files if file.lower().endswith(SUFFIXES) and "readme" not in file.lower())
    if not usable:
        raise TextError(f"{repo}: has no file of a kind that can be read ({', '.join(SUFFIXES)}).")
    return next((file for file in usable if "train" in file.lower()), usable[0])


def _documents(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    content = read_text(path).content
    if path.suffix not in (".jsonl", ".json"):
        yield content
        return
    try:
        records = json.loads(content) if path.suffix == ".json" else map(json.loads, content.splitlines())
        yield from (text for record in records if (text := _field(record)))
    except ValueError as error:
        raise TextError(f"{path.name}: not valid JSON ({error}).") from None


def _field(record: Any) -> str:
    if isinstance(record, str):
        return record
    return next((str(record[key]) for key in FIELDS if record.get(key)), "") if isinstance(record, dict) else ""


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingPackageError(
            "Reading a Parquet data set needs pyarrow: pip install pyarrow. Or give a text file."
        ) from None
    file = parquet.ParquetFile(path)
    columns = [name for name in FIELDS if name in file.schema_arrow.names]
    n = 0
    for batch in file.iter_batches(columns=columns[:1]) if columns else ():
        for text in batch.column(0).to_pylist():
            yield text or ""
            n += len(text or "")
        if n > MOST:
            return
