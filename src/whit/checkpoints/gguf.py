"""GGUF files, read lazily and written whole.

The `gguf` package's reader maps the file and builds an object per field; this one reads the header once with
every count and offset checked against the file size, and tensors at their offsets. Types that this package
has a grid for are decoded by it, all others by the `gguf` package.
Source: the GGUF specification, version 3 (version 2 differs in nothing that is read here).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from whit.checkpoints.reading import BoundedFile
from whit.checkpoints.source import TensorInfo
from whit.errors import BrokenFileError, ModelError
from whit.layouts.ggml import GGML_TYPES

MAGIC = b"GGUF"
COPIED = 1 << 24  # bytes at a time
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MOST_OF_KEY, MOST_OF_NAME = 65535, 64  # bytes; GGUF specification

# Value types by number; ARRAY carries an element type and a count.
_SCALARS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY, UINT32, INT32, FLOAT32, UINT64, INT64 = 7, 8, 9, 4, 5, 6, 10, 11

_ELEMENTS = {bool: BOOL, int: INT32, float: FLOAT32, str: STRING}

GGUFType = tuple[int, int | None]  # value type, element type of an array


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    kind: int
    offset: int


class GGUFFile:
    """The metadata and tensors of one GGUF file.

    metadata  plain Python values by key
    types     the GGUF type of each value, so that it can be written back unchanged
    Raises BrokenFileError for anything truncated or inconsistent, ModelError for one part of a split file.
    """

    def __init__(self, path: Path) -> None:
        self._file = BoundedFile(path)
        self.path = path
        self.n_bytes = self._file.size
        self.metadata, self.types, self._entries = _read_header(self._file)

    def names(self) -> Sequence[str]:
        """All tensor names, in file order."""
        return list(self._entries)

    def info(self, name: str) -> TensorInfo:
        """What the header says."""
        return self._entries[name].info

    def offset(self, name: str) -> int:
        """The first byte of a tensor in the file."""
        return self._entries[name].offset

    def raw(self, name: str) -> Tensor:
        """The stored bytes as a flat uint8 tensor."""
        entry = self._entries[name]
        return self._file.tensor_at(entry.offset, entry.info.n_bytes, f"tensor {name}")

    def with_changes(self, file: BinaryIO, data: Iterable[tuple[str, Tensor]]) -> None:
        """Write a copy in which some tensors have other bytes, flat uint8, of the same types and sizes.

        Raises ValueError for another size.
        """
        for start in range(0, self.n_bytes, COPIED):
            n_bytes = min(COPIED, self.n_bytes - start)
            file.write(self._file.tensor_at(start, n_bytes, "a part of the file").numpy().data)
        for name, raw in data:
            entry = self._entries[name]
            if raw.numel() != entry.info.n_bytes:
                raise ValueError(f"{name}: {raw.numel()} bytes were given, {entry.info.n_bytes} are stored")
            file.seek(entry.offset)
            file.write(raw.numpy().data)

    def read(self, name: str) -> Tensor:
        """Floats as stored, quantized types decoded to float32. Raises ModelError for a type nobody decodes."""
        info, raw = self.info(name), self.raw(name)
        if info.dtype in GGML_TYPES:
            kind = GGML_TYPES[info.dtype]
            if not kind.fields:
                return kind.unpack(raw, (1, math.prod(info.shape))).codes.view(info.shape)
            rows = math.prod(info.shape[:-1])
            return kind.unpack(raw, (rows, info.shape[-1])).dequantize().view(info.shape)
        number = gguf.GGMLQuantizationType(self._entries[name].kind)
        try:
            values = gguf.quants.dequantize(raw.numpy().reshape(*info.shape[:-1], -1), number)
        except NotImplementedError:
            raise ModelError(f"{self.path}: tensor {name} has type {info.dtype}, which cannot be decoded.") from None
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(info.shape)


class _Cursor:
    """Reads forward through a header; knows how many bytes are left."""

    def __init__(self, file: BoundedFile) -> None:
        self.file, self.position = file, 0
        self._buffer, self._base = b"", 0

    def take(self, n_bytes: int, what: str) -> bytes:
        start = self.position - self._base
        if start + n_bytes > len(self._buffer):
            if n_bytes > self.left:
                self.file.bytes_at(self.position, n_bytes, what)  # raises, with both sizes
            chunk = min(max(n_bytes, 1 << 20), self.left)
            self._buffer, self._base, start = self.file.bytes_at(self.position, chunk, what), self.position, 0
        self.position += n_bytes
        return self._buffer[start : start + n_bytes]

    @property
    def left(self) -> int:
        return self.file.size - self.position

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, least_bytes: int, what: str) -> int:
        """A 64-bit count of things that take at least `least_bytes` each; refuses what cannot be there."""
        n: int = self.scalar("Q", what)
        if n * least_bytes > self.left:
            raise BrokenFileError(f"{self.file.path}: truncated or corrupt. It announces {n:,} as {what}.")
        return n

    def string(self, what: str) -> str:
        # token texts of byte-level vocabularies are not always valid UTF-8 in files of other tools
        return self.take(self.count(1, f"length of {what}"), what).decode("utf-8", "surrogateescape")

    def name(self, what: str, most: int) -> str:
        """A name that can be printed, of at most `most` bytes: whatever a corrupt length takes for one is not shown."""
        n = self.count(1, f"length of {what}")
        if n > most:
            raise BrokenFileError(f"{self.file.path}: {what} of {n:,} bytes. The file is corrupt.")
        text = self.take(n, what).decode("utf-8", "surrogateescape")
        if not text.isprintable():
            raise BrokenFileError(f"{self.file.path}: {what} is {ascii(text)[:80]}. The file is corrupt.")
        return text

    def value(self, what: str) -> tuple[Any, GGUFType]:
        kind = self.scalar("I", what)
        if kind == STRING:
            return self.string(what), (kind, None)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what), (kind, None)
        if kind != ARRAY:
            raise BrokenFileError(f"{self.file.path}: {what} has unknown value type {kind}. The file is corrupt.")
        element = self.scalar("I", what)
        if element == STRING:
            return [self.string(what) for _ in range(self.count(8, f"length of {what}"))], (kind, element)
        if element not in _SCALARS:
            raise BrokenFileError(f"{self.file.path}: {what} is an array of unknown type {element}.")
        size = struct.calcsize("<" + _SCALARS[element])
        n = self.count(size, f"length of {what}")
        return list(struct.unpack(f"<{n}{_SCALARS[element]}", self.take(n * size, what))), (kind, element)


def _read_header(file: BoundedFile) -> tuple[dict[str, Any], dict[str, GGUFType], dict[str, _Entry]]:
    cursor = _Cursor(file)
    if cursor.take(4, "the magic number") != MAGIC:
        raise BrokenFileError(f"{file.path}: not a GGUF file (it does not start with 'GGUF').")
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        hint = "it is big-endian" if version >> 24 else "only versions 2 and 3 are known"
        raise BrokenFileError(f"{file.path}: GGUF version {version & 0xFFFFFFFF} cannot be read ({hint}).")
    n_tensors = cursor.count(24, "number of tensors")
    n_values = cursor.count(13, "number of metadata entries")
    metadata: dict[str, Any] = {}
    types: dict[str, GGUFType] = {}
    for _ in range(n_values):
        key = cursor.name("a metadata key", MOST_OF_KEY)
        metadata[key], types[key] = cursor.value(f"metadata {key}")
    if metadata.get("split.count", 1) > 1:
        raise ModelError(
            f"{file.path}: one of {metadata['split.count']} parts. Merge them with llama-gguf-split first."
        )
    descriptions = [_description(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise BrokenFileError(f"{file.path}: general.alignment is {alignment!r}, expected a multiple of 8.")
    start = _padded(cursor.position, alignment)
    entries: dict[str, _Entry] = {}
    for name, shape, kind, offset in descriptions:
        if name in entries:
            raise BrokenFileError(f"{file.path}: tensor {name} is listed twice. The file is corrupt.")
        if offset % alignment:
            raise BrokenFileError(f"{file.path}: tensor {name} is not aligned to {alignment} bytes.")
        info = _info(file, name, shape, kind)
        if start + offset + info.n_bytes > file.size:
            raise BrokenFileError(
                f"{file.path}: truncated. Tensor {name} ends at byte {start + offset + info.n_bytes:,} but the file "
                f"has {file.size:,}. Download or copy it again."
            )
        entries[name] = _Entry(info, kind, start + offset)
    return metadata, types, entries


def _description(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.name("a tensor name", MOST_OF_NAME)
    n_dims = cursor.scalar("I", f"dimensions of {name}")
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        raise BrokenFileError(f"{cursor.file.path}: tensor {name} has {n_dims} dimensions. The file is corrupt.")
    dims = [cursor.scalar("Q", f"shape of {name}") for _ in range(n_dims)]
    return name, tuple(reversed(dims)), cursor.scalar("I", f"type of {name}"), cursor.scalar("Q", f"offset of {name}")


def _info(file: BoundedFile, name: str, shape: tuple[int, ...], kind: int) -> TensorInfo:
    try:
        number = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise BrokenFileError(
            f"{file.path}: tensor {name} has unknown type {kind}; the file is corrupt or newer."
        ) from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    if shape[-1] % block:
        raise BrokenFileError(
            f"{file.path}: rows of {name} ({shape[-1]}) are not whole {number.name} blocks of {block}."
        )
    return TensorInfo(name, shape, number.name, math.prod(shape) // block * block_bytes)


@dataclass(frozen=True)
class Announced:
    """A tensor that will be written: shape in PyTorch order, GGML type name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        """Bytes of its data, without padding."""
        return GGML_TYPES[self.dtype].n_bytes(self.shape)

    @property
    def n_stored(self) -> int:
        """Bytes that it takes in a file."""
        return _padded(self.n_bytes, DEFAULT_ALIGNMENT)


class GGUFWriter:
    """Header first, then tensors in the announced order; the size is known before the first byte is written.

    metadata  plain Python values; without an entry in `types` an int becomes uint32 (uint64 when it does not
              fit), a list of ints int32, floats float32
    Values of general.alignment are dropped: the alignment written is 32.
    """

    def __init__(
        self, metadata: Mapping[str, Any], tensors: Sequence[Announced], types: Mapping[str, GGUFType] | None = None
    ) -> None:
        kept = {key: value for key, value in metadata.items() if key != "general.alignment"}
        out = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(kept)))
        for key, value in kept.items():
            out += _string(key) + _value(key, value, (types or {}).get(key) or natural_type(key, value))
        offset, self._offsets = 0, dict[str, int]()
        for tensor in tensors:
            out += _string(tensor.name) + struct.pack("<I", len(tensor.shape))
            out += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            out += struct.pack("<IQ", GGML_TYPES[tensor.dtype].number, offset)
            self._offsets[tensor.name] = offset
            offset += tensor.n_stored
        self._header = bytes(out).ljust(_padded(len(out), DEFAULT_ALIGNMENT), b"\0")
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.n_bytes = len(self._header) + offset

    def write(self, file: BinaryIO, data: Iterable[tuple[str, Iterable[Tensor]]]) -> None:
        """Write everything; `data` gives every announced tensor's name and pieces (flat uint8), in any order.

        Raises ValueError when a tensor is missing or its pieces do not add up to the announced bytes.
        """
        file.write(self._header)
        missing = dict(self._tensors)
        for name, pieces in data:
            tensor, written = missing.pop(name), 0
            file.seek(len(self._header) + self._offsets[name])
            for piece in pieces:
                file.write(piece.numpy().data)
                written += piece.numel()
            if written != tensor.n_bytes:
                raise ValueError(f"{name}: {written} bytes were given, {tensor.n_bytes} announced")
            file.write(b"\0" * (_padded(written, DEFAULT_ALIGNMENT) - written))
        if missing:
            raise ValueError(f"announced but not given: {', '.join(missing)}")


def natural_type(key: str, value: Any) -> GGUFType:
    """The GGUF type for a plain Python value. Raises TypeError for anything else."""
    if isinstance(value, bool):
        return BOOL, None
    if isinstance(value, int):
        return (UINT32 if 0 <= value < 2**32 else UINT64 if value >= 0 else INT64), None
    if isinstance(value, float):
        return FLOAT32, None
    if isinstance(value, str):
        return STRING, None
    elements = {type(item) for item in value} if isinstance(value, list | tuple) else set()
    if len(elements) == 1 and elements <= _ELEMENTS.keys():
        return ARRAY, _ELEMENTS[elements.pop()]
    raise TypeError(f"metadata {key} cannot hold {value!r}")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any, kind: GGUFType) -> bytes:
    number, element = kind
    try:
        if number == STRING:
            return struct.pack("<I", number) + _string(value)
        if element is None:
            return struct.pack("<I" + _SCALARS[number], number, value)
        head = struct.pack("<IIQ", number, element, len(value))
        if element == STRING:
            return head + b"".join(map(_string, value))
        return head + struct.pack(f"<{len(value)}{_SCALARS[element]}", *value)
    except (struct.error, AttributeError) as error:
        raise TypeError(f"metadata {key} cannot be written as GGUF type {kind}: {error}") from error


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
