import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from whit.checkpoints.folder import INDEX, open_folder, read_config
from whit.errors import BrokenFileError, ModelError


def sharded(folder: Path) -> Path:
    save_file({"a": torch.zeros(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_one_source(tmp_path: Path) -> None:
    tensors, n_bytes = open_folder(sharded(tmp_path))
    assert sorted(tensors.names()) == ["a", "b"]
    assert torch.equal(tensors.read("b"), torch.ones(3))
    assert n_bytes == sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(BrokenFileError, match=r"1 of 2 shards are missing: model-2.safetensors"):
        open_folder(tmp_path)


def test_a_shard_without_its_tensor_is_named(tmp_path: Path) -> None:
    save_file({"c": torch.ones(3)}, sharded(tmp_path) / "model-2.safetensors")
    with pytest.raises(BrokenFileError, match=r"promises b in model-2.safetensors"):
        open_folder(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(BrokenFileError, match="points outside the folder"):
        open_folder(tmp_path)


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(BrokenFileError, match="no weight_map"):
        open_folder(tmp_path)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert list(open_folder(tmp_path)[0].names()) == ["a"]


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelError, match="only pickled weights"):
        open_folder(tmp_path)


def test_an_empty_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        open_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_broken_config_is_explained(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BrokenFileError, match=r"config.json"):
        read_config(tmp_path)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json is missing"):
        read_config(tmp_path)
