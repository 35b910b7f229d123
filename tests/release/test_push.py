"""Uploads, to an object that stands for the hub: nothing here reaches a network."""

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from whit.errors import OutputError, RecipeError
from whit.release.push import check_login, push


class FakeHub:
    """Notes what it is asked for, or refuses."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.refuses, self.asked = refuses, list[str]()

    def whoami(self) -> dict[str, str]:
        if self.refuses:
            raise self.refuses
        return {"name": "somebody"}

    def create_repo(self, repo_id: str, repo_type: str, exist_ok: bool) -> str:
        self.asked.append(f"create {repo_id} {repo_type} {exist_ok}")
        return f"https://example.invalid/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: list[str]) -> None:
        if self.refuses:
            raise self.refuses
        self.asked.append(f"upload {folder_path} to {repo_id}")


def test_a_release_is_uploaded_whole(tmp_path: Path) -> None:
    hub = FakeHub()
    check_login("owner/name", hub)
    assert push(tmp_path, "owner/name", hub) == "https://example.invalid/owner/name"
    assert hub.asked == ["create owner/name model True", f"upload {tmp_path} to owner/name"]


def test_without_a_login_it_says_how_to_get_one_before_any_work() -> None:
    with pytest.raises(OutputError, match="hf auth login"):
        check_login("owner/name", FakeHub(LocalTokenNotFoundError("no token")))


def test_a_name_of_another_form_is_refused_before_the_hub_is_asked() -> None:
    with pytest.raises(RecipeError, match="OWNER/NAME"):
        check_login("name", FakeHub(AssertionError()))


def test_a_hub_that_cannot_be_reached_is_no_traceback(tmp_path: Path) -> None:
    hub = FakeHub(ConnectionError("unreachable\nmore lines"))
    with pytest.raises(OutputError, match=r"\(unreachable\)"):
        check_login("owner/name", hub)
    with pytest.raises(OutputError, match="It is whole in"):
        push(tmp_path, "owner/name", hub)
