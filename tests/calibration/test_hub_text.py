import json
from pathlib import Path

import huggingface_hub
import pytest

from whit.calibration.hub_text import hub_text
from whit.errors import TextError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the data set `someone/words`."""

    def files(repo: str, repo_type: str) -> list[str]:
        assert (repo, repo_type) == ("someone/words", "dataset")
        return [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]

    monkeypatch.setattr(huggingface_hub, "list_repo_files", files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, path, repo_type: str(tmp_path / path))
    return tmp_path


def test_the_training_split_is_taken_and_a_named_file_if_asked_for(hub: Path) -> None:
    (hub / "README.md").write_text("about")
    (hub / "test.txt").write_text("held out")
    (hub / "train.txt").write_text("to learn from")
    assert hub_text("someone/words").content == "to learn from"
    assert hub_text("someone/words/test.txt").content == "held out"
    assert "someone/words" in hub_text("someone/words").description


def test_records_give_their_text_field(hub: Path) -> None:
    lines = [{"id": 1, "text": "one"}, {"content": "two"}, {"other": "three"}]
    (hub / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert hub_text("someone/words").content == "one\n\ntwo"


def test_records_without_text_are_explained(hub: Path) -> None:
    (hub / "train.jsonl").write_text('{"label": 1}')
    with pytest.raises(TextError, match="holds no text"):
        hub_text("someone/words")
    (hub / "train.jsonl").write_text("{broken")
    with pytest.raises(TextError, match="not valid JSON"):
        hub_text("someone/words")


def test_a_data_set_without_usable_files_is_explained(hub: Path) -> None:
    (hub / "code.py").write_text("print()")
    with pytest.raises(TextError, match="no file of a kind that can be read"):
        hub_text("someone/words")


def test_offline_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    with pytest.raises(TextError, match="cannot be reached for this data set"):
        hub_text("someone/words")
