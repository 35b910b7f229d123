"""One safetensors file, read lazily.

The `safetensors` package maps the file into memory; mapped pages count as resident, and a conversion that
should need one tensor would show the whole model. The format is a length, a JSON header and raw bytes, so
reading it at offsets is short. All the format's rules are checked when the file is opened.
Source: the safetensors format specification (header at most 100 MB, no holes, no overlaps).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.checkpoints.reading import BoundedFile
from whit.checkpoints.source import TensorInfo
from whit.errors import BrokenFileError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    offset: int


class SafetensorsFile:
    """The tensors of one .safetensors file. Raises BrokenFileError for anything the format does not allow."""

    def __init__(self, path: Path) -> None:
        self._file = BoundedFile(path)
        self._entries = _read_header(self._file)

    def names(self) -> Sequence[str]:
        """All names, in the order of the data."""
        return list(self._entries)

    def info(self, name: str) -> TensorInfo:
        """What the header says."""
        return self._entries[name].info

    def read(self, name: str) -> Tensor:
        """The tensor as stored."""
        entry = self._entries[name]
        raw = self._file.tensor_at(entry.offset, entry.info.n_bytes, f"tensor {name}")
        return raw.view(DTYPES[entry.info.dtype]).view(entry.info.shape)

    def read_some(self, name: str, start: int, n: int) -> Tensor:
        """Entries `start` to `start + n` along the first dimension, as stored."""
        info, offset = self._entries[name].info, self._entries[name].offset
        each = info.n_bytes // max(1, info.shape[0])
        raw = self._file.tensor_at(offset + start * each, n * each, f"part of tensor {name}")
        return raw.view(DTYPES[info.dtype]).view(n, *info.shape[1:])


def _read_header(file: BoundedFile) -> dict[str, _Entry]:
    length = int.from_bytes(file.bytes_at(0, 8, "the header length"), "little")
    if length > MAX_HEADER_BYTES:
        raise BrokenFileError(f"{file.path}: not a safetensors file (it claims a header of {length:,} bytes).")
    try:
        header = json.loads(file.bytes_at(8, length, "the header"))
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
    except ValueError as error:  # malformed JSON and malformed UTF-8 alike
        raise BrokenFileError(
            f"{file.path}: the safetensors header is corrupt ({error}). Download it again."
        ) from error
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _entry(file, name, fields, start) for name, fields in header.items()}
    in_order = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].info.n_bytes)))
    end = start
    for name, entry in in_order.items():
        if entry.offset != end:
            raise BrokenFileError(f"{file.path}: the data of {name} does not start where the previous tensor ends.")
        end += entry.info.n_bytes
    if end > file.size:
        raise BrokenFileError(
            f"{file.path}: truncated. Its header promises {end:,} bytes but the file has {file.size:,}. "
            "Download or copy it again."
        )
    return in_order


def _entry(file: BoundedFile, name: str, fields: Any, start: int) -> _Entry:
    def broken(why: str) -> BrokenFileError:
        return BrokenFileError(f"{file.path}: the header entry of {name} is corrupt ({why}). Download the file again.")

    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise broken("dtype, shape or data_offsets is missing") from None
    if dtype not in DTYPES:
        raise broken(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in [*shape, begin, end]):
        raise broken("shape and offsets must be whole numbers")
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != n_bytes:
        raise broken(f"{dtype} {shape} takes {n_bytes:,} bytes, its offsets span {end - begin:,}")
    return _Entry(TensorInfo(name, tuple(shape), dtype, n_bytes), start + begin)
