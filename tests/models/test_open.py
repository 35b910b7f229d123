from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tiny import save_tiny
from whit.checkpoints.safetensors import SafetensorsFile
from whit.errors import BrokenFileError, ModelError
from whit.models.open import open_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("qwen2", tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_opened_by_its_path(folder: Path) -> None:
    model = open_model(folder)
    assert model.config["model_type"] == "qwen2"
    assert model.tokenizer_dir == folder
    assert model.n_bytes == (folder / "model.safetensors").stat().st_size


def test_the_built_in_name_needs_no_path() -> None:
    model = open_model("smollm2-135m")
    assert model.config["hidden_size"] == 576
    assert model.gguf_metadata["tokenizer.ggml.pre"] == "smollm"


def test_a_hub_id_is_downloaded_and_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repo_id: str, **_: object) -> str:
        asked.append(repo_id)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_model("owner/name").config["model_type"] == "qwen2"
    assert asked == ["owner/name"]


def test_headers_of_a_hub_model_are_enough_to_know_its_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: SimpleNamespace(dtype="F32", shape=list(file.info(name).shape)) for name in file.names()}
    found = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(folder / "config.json"))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda _: found)
    model = open_model("owner/name", fetch=False)
    assert model.config["model_type"] == "qwen2"
    assert model.n_bytes == sum(file.info(name).n_bytes for name in file.names())
    with pytest.raises(ValueError, match="only headers"):
        model.tensors.read(model.tensors.names()[0])


def test_an_unreachable_hub_says_what_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=r"owner/name: not a local path, and the hub cannot be reached"):
        open_model("owner/name")


def test_a_weight_file_alone_is_not_a_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="give the folder"):
        open_model(folder / "model.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("not a model")
    with pytest.raises(BrokenFileError, match="not a GGUF file"):
        open_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_name_that_is_nothing_lists_what_a_model_can_be(name: str) -> None:
    with pytest.raises(ModelError, match=r"hub id .* built-in name \(smollm2-135m\)"):
        open_model(name)
