"""Safetensors files of known shapes, filled in any order: a model's shards and their index.

The header comes first in the file and names every offset, so all shapes must be known before the first value is;
values may then come as they are made. Source: the safetensors format specification.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from whit.checkpoints.folder import INDEX, SINGLE
from whit.checkpoints.safetensors import DTYPES
from whit.grids.grid import Spec

SHARD_BYTES = 5 * 10**9  # as transformers cuts
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}  # transformers asks for it


class Shards:
    """The weight files of one folder.

    n_bytes  of all files together, the index included
    """

    def __init__(self, specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES) -> None:
        """specs  every tensor, in the order in which they shall lie"""
        self._specs = specs
        cut: list[list[str]] = [[]]
        filled = 0
        for name, spec in specs.items():
            if cut[-1] and filled + _size(spec) > shard_bytes:
                cut.append([])
                filled = 0
            cut[-1].append(name)
            filled += _size(spec)
        many = len(cut) > 1
        files = [f"model-{k + 1:05d}-of-{len(cut):05d}.safetensors" if many else SINGLE for k in range(len(cut))]
        self._headers = {file: _header(specs, names) for file, names in zip(files, cut, strict=True)}
        self._home = {name: file for file, names in zip(files, cut, strict=True) for name in names}
        self._index = _index(self._home, sum(map(_size, specs.values()))) if many else b""
        self.n_bytes = sum(map(len, self._headers.values())) + sum(map(_size, specs.values())) + len(self._index)
        self._open: dict[str, BinaryIO] = {}
        self._missing = set(specs)
        self._offsets = _offsets(specs, cut, self._headers)

    def create(self, folder: Path) -> None:
        """Open all files in `folder` and write their headers."""
        for file, header in self._headers.items():
            self._open[file] = (folder / file).open("wb")
            self._open[file].write(header)
        if self._index:
            (folder / INDEX).write_bytes(self._index)

    def write(self, name: str, value: Tensor) -> None:
        """One tensor, of the shape and dtype that were announced. Raises ValueError for another."""
        spec = self._specs[name]
        if tuple(value.shape) != tuple(spec.shape) or value.dtype != spec.dtype:
            found, announced = f"{value.dtype} {list(value.shape)}", f"{spec.dtype} {list(spec.shape)}"
            raise ValueError(f"{name} is {found}, announced as {announced}")
        file = self._open[self._home[name]]
        file.seek(self._offsets[name])
        file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def close(self) -> None:
        """Close all files. Raises ValueError when a tensor was not written."""
        for file in self._open.values():
            file.close()
        if self._missing:
            raise ValueError(f"not written: {', '.join(sorted(self._missing)[:5])}")


def _size(spec: Spec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _header(specs: Mapping[str, Spec], names: list[str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": METADATA}
    end = 0
    for name in names:
        spec, start = specs[name], end
        end = start + _size(spec)
        entries[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _offsets(specs: Mapping[str, Spec], cut: list[list[str]], headers: Mapping[str, bytes]) -> dict[str, int]:
    found: dict[str, int] = {}
    for names, header in zip(cut, headers.values(), strict=True):
        end = len(header)
        for name in names:
            found[name] = end
            end += _size(specs[name])
    return found


def _index(home: Mapping[str, str], total: int) -> bytes:
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(home.items()))}, indent=2).encode()
