"""A hub id such as `Qwen/Qwen3-0.6B`: its files in the local cache, downloaded once by huggingface_hub.

Only weights in safetensors, configuration and tokenizer files are asked for: no code, no pickles.
"""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from whit.errors import ModelError

PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def looks_like_hub_id(text: str) -> bool:
    """True for `owner/name`."""
    return _ID.fullmatch(text) is not None


def download(repo_id: str) -> Path:
    """The local folder of a hub model. Raises ModelError when it does not exist or the hub cannot be reached."""
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=PATTERNS))
    except RepositoryNotFoundError:
        raise ModelError(
            f"{repo_id}: no such model on the hub, or it is private. Check the name; log in with "
            "`hf auth login` if you have access."
        ) from None
    except HFValidationError as error:
        raise ModelError(f"{repo_id}: not a valid hub id ({error}).") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{repo_id}: not a local path, and the hub cannot be reached to download it ({_first_line(error)}). "
            "Give a folder or a .gguf file, or try again when you are online."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
