"""A Hugging Face folder: config.json and one or many safetensors shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from whit.checkpoints.safetensors import SafetensorsFile
from whit.checkpoints.source import TensorInfo
from whit.errors import BrokenFileError, ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class ShardedTensors:
    """Tensors spread over safetensors files, seen as one source."""

    def __init__(self, shards: Sequence[SafetensorsFile]) -> None:
        self._home = {name: shard for shard in shards for name in shard.names()}

    def names(self) -> Sequence[str]:
        """All names, shard by shard."""
        return list(self._home)

    def info(self, name: str) -> TensorInfo:
        """What the shard's header says."""
        return self._home[name].info(name)

    def read(self, name: str) -> Tensor:
        """The tensor as stored."""
        return self._home[name].read(name)

    def read_some(self, name: str, start: int, n: int) -> Tensor:
        """Entries `start` to `start + n` along the first dimension, as stored."""
        return self._home[name].read_some(name, start, n)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises BrokenFileError when it is missing, malformed or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenFileError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise BrokenFileError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError when there is none."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: not a model folder, config.json is missing. Give the folder that holds it.")
    return read_json(folder / "config.json")


def open_folder(folder: Path) -> tuple[ShardedTensors, int]:
    """The tensors of a folder and the bytes of its weight files.

    Follows the index when there is one, else takes model.safetensors, else every .safetensors file.
    Raises BrokenFileError for a missing or broken shard, ModelError when there are only pickles or nothing.
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BrokenFileError(f"{folder / INDEX}: has no weight_map. Download the index again.")
        files = [_inside(folder, str(name)) for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise BrokenFileError(
                f"{folder}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:4])}"
                f"{' ...' if len(missing) > 4 else ''}. Download them into the folder."
            )
        tensors = ShardedTensors([SafetensorsFile(file) for file in files])
        absent = sorted(set(weight_map) - set(tensors.names()))
        if absent:
            raise BrokenFileError(
                f"{folder}: the index promises {absent[0]} in {weight_map[absent[0]]}, but it is not there "
                f"({len(absent)} such tensors). The shards and the index do not belong together."
            )
        return tensors, sum(file.stat().st_size for file in files)
    files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [file.name for pattern in PICKLES for file in folder.glob(pattern)]
        if pickles:
            raise ModelError(
                f"{folder}: holds only pickled weights ({pickles[0]}), which can run code when loaded; Whit never "
                "loads them. Save the model again with save_pretrained(..., safe_serialization=True)."
            )
        raise ModelError(f"{folder}: holds no .safetensors file. Give a folder with the model's weights.")
    return ShardedTensors([SafetensorsFile(file) for file in files]), sum(file.stat().st_size for file in files)


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise BrokenFileError(f"{folder / INDEX}: shard name {name!r} points outside the folder.")
    return folder / name
