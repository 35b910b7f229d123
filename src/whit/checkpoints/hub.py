"""A hub id such as `Qwen/Qwen3-0.6B`: its files in the local cache, downloaded once by huggingface_hub.

Only weights in safetensors, configuration, tokenizer files and the card are asked for: no code, no pickles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
)
from torch import Tensor

from whit.checkpoints.folder import read_json
from whit.checkpoints.safetensors import DTYPES
from whit.checkpoints.source import TensorInfo
from whit.errors import ModelError

PATTERNS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "README.md",
]
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def looks_like_hub_id(text: str) -> bool:
    """True for `owner/name`."""
    return _ID.fullmatch(text) is not None


class HubHeaders:
    """Names, shapes and types of a hub model's tensors; their values stay on the hub."""

    def __init__(self, infos: Sequence[TensorInfo]) -> None:
        self._infos = {info.name: info for info in infos}

    def names(self) -> Sequence[str]:
        """All tensor names."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """What the header says."""
        return self._infos[name]

    def read(self, name: str) -> Tensor:
        """Raises ValueError: nothing but headers was fetched."""
        raise ValueError(f"{name} was not downloaded; only headers were")


def download(repo_id: str) -> Path:
    """The local folder of a hub model. Raises ModelError when it does not exist or the hub cannot be reached."""
    with _explained(repo_id):
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=PATTERNS))


def beside(repo_id: str) -> Path:
    """A local folder with what lies beside the weights of a hub model. Raises ModelError as `download` does."""
    with _explained(repo_id):
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=PATTERNS[1:]))


def headers(repo_id: str) -> tuple[dict[str, Any], HubHeaders, int]:
    """config.json, tensor headers and bytes of the weights of a hub model: kilobytes over the network.

    Raises ModelError when it does not exist, has no safetensors files, or the hub cannot be reached.
    """
    with _explained(repo_id):
        config = read_json(Path(huggingface_hub.hf_hub_download(repo_id, "config.json")))
        files = huggingface_hub.get_safetensors_metadata(repo_id).files_metadata
    infos = [
        TensorInfo(name, tuple(t.shape), t.dtype, math.prod(t.shape) * DTYPES[t.dtype].itemsize)
        for file in files.values()
        for name, t in file.tensors.items()
    ]
    return config, HubHeaders(infos), sum(info.n_bytes for info in infos)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    try:
        yield
    except RepositoryNotFoundError:
        raise ModelError(
            f"{repo_id}: no such model on the hub, or it is private. Check the name; log in with "
            "`hf auth login` if you have access."
        ) from None
    except NotASafetensorsRepoError:
        raise ModelError(f"{repo_id}: has no safetensors files; Whit never loads pickled weights.") from None
    except HFValidationError as error:
        raise ModelError(f"{repo_id}: not a valid hub id ({error}).") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{repo_id}: not a local path, and the hub cannot be reached to download it ({_first_line(error)}). "
            "Give a folder or a .gguf file, or try again when you are online."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
