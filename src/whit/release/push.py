"""A finished release onto the hub, by huggingface_hub and the login that it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from whit.checkpoints.hub import looks_like_hub_id
from whit.errors import OutputError, RecipeError


def check_login(repo_id: str, api: Any = None) -> None:
    """Raise, before any work, RecipeError for a name of another form and OutputError when nobody is logged in.

    api  instead of the hub's
    """
    if not looks_like_hub_id(repo_id):
        raise RecipeError(f"--push {repo_id!r} is not a name on the hub. Write OWNER/NAME.")
    try:
        (api or HfApi()).whoami()
    except LocalTokenNotFoundError:
        raise OutputError("--push needs a login on the hub: run `hf auth login` first.") from None
    except (HfHubHTTPError, OSError) as error:
        raise OutputError(f"--push: the hub does not accept the login ({_first_line(error)}).") from error


def push(folder: Path, repo_id: str, api: Any = None) -> str:
    """Upload a finished release, making the repository if it is not there; its address.

    api  instead of the hub's
    Raises OutputError when the hub refuses.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(repo_id, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Release by Whit", ignore_patterns=[".*"])
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise OutputError(
            f"{repo_id}: the hub did not take the release ({_first_line(error)}). It is whole in {folder}; repeat the "
            "command to push it again."
        ) from error
    return str(address)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
