"""Importance matrices of llama.cpp, both kinds: read, and written whole.

    GGUF    per tensor `NAME.in_sum2` [experts, cols], sums of squared inputs, and `NAME.counts` [experts, 1]
    legacy  int32 entries; per entry a name, the number of chunks it was seen in, and mean squares times that number;
            then the number of chunks and the name of the text

Source: the behaviour of llama.cpp's imatrix tool; checked against its files (bench/importance.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whit.checkpoints.atomic import whole_file
from whit.checkpoints.gguf import MAGIC, Announced, GGUFFile, GGUFWriter
from whit.checkpoints.reading import BoundedFile
from whit.errors import BrokenFileError

SUMS, COUNTS = ".in_sum2", ".counts"
CHUNK = 512  # tokens; the legacy kind does not say


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squared inputs by GGUF tensor name.

    means       [experts, cols] float32; one row for a matrix that is not of experts
    counts      [experts] integers: tokens behind each row
    n_chunks    chunks of text, of `chunk_size` tokens
    datasets    what the text was
    """

    means: dict[str, Tensor]
    counts: dict[str, Tensor]
    n_chunks: int
    chunk_size: int
    datasets: tuple[str, ...]


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read either kind. Raises BrokenFileError."""
    with BoundedFile(path) as file:
        is_gguf = file.size >= len(MAGIC) and file.bytes_at(0, len(MAGIC), "the magic number") == MAGIC
        matrix = _read_gguf(path) if is_gguf else _read_legacy(file)
    if not matrix.means:
        raise BrokenFileError(f"{path}: holds no importance matrix.")
    for name, mean in matrix.means.items():
        if not torch.isfinite(mean).all() or (mean < 0).any():
            raise BrokenFileError(f"{path}: the mean squares of {name} are negative or not finite. Make it again.")
    return matrix


def write_imatrix(matrix: ImportanceMatrix, path: Path, overwrite: bool = False) -> None:
    """Write the legacy kind when the name ends in .dat, GGUF otherwise. Raises OutputError."""
    if path.suffix == ".dat":
        raw = _legacy(matrix)
        with whole_file(path, len(raw), overwrite) as file:
            file.write(raw)
        return
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(matrix.datasets),
        "imatrix.chunk_count": matrix.n_chunks,
        "imatrix.chunk_size": matrix.chunk_size,
    }
    tensors = {}
    for name in sorted(matrix.means):
        counts = matrix.counts[name].float()[:, None]
        tensors[name + SUMS], tensors[name + COUNTS] = matrix.means[name] * counts, counts
    announced = [Announced(name, tuple(value.shape), "F32") for name, value in tensors.items()]
    writer = GGUFWriter(metadata, announced)
    with whole_file(path, writer.n_bytes, overwrite) as file:
        writer.write(file, ((name, _flat(value)) for name, value in tensors.items()))


def _flat(value: Tensor) -> Iterator[Tensor]:
    yield value.float().contiguous().view(-1).view(torch.uint8)


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = GGUFFile(path)
    means, counts = {}, {}
    for name in file.names():
        if not name.endswith(SUMS):
            continue
        base = name.removesuffix(SUMS)
        if base + COUNTS not in file.names():
            raise BrokenFileError(f"{path}: {base} has sums but no counts. The file is no importance matrix.")
        sums, seen = file.read(name).float(), file.read(base + COUNTS).float().view(-1)
        sums = sums.view(-1, sums.shape[-1])
        if len(seen) != len(sums):
            raise BrokenFileError(f"{path}: {base} has {len(sums)} rows of sums and {len(seen)} counts.")
        means[base] = torch.where(seen[:, None] > 0, sums / seen[:, None].clamp(min=1), 1.0)
        counts[base] = seen.long()
    get = file.metadata.get
    datasets = tuple(get("imatrix.datasets", ()))
    return ImportanceMatrix(means, counts, get("imatrix.chunk_count", 0), get("imatrix.chunk_size", CHUNK), datasets)


def _read_legacy(file: BoundedFile) -> ImportanceMatrix:
    position = 0

    def take(n_bytes: int, what: str) -> bytes:
        nonlocal position
        raw = file.bytes_at(position, n_bytes, what)
        position += n_bytes
        return raw

    def integer(what: str) -> int:
        value: int = struct.unpack("<i", take(4, what))[0]
        if value < 0:
            raise BrokenFileError(f"{file.path}: no importance matrix, or a corrupt one ({what} is {value}).")
        return value

    means, counts = {}, {}
    for _ in range(integer("the number of entries")):
        name = take(integer("the length of a name"), "a name").decode("utf-8", "replace")
        n_calls, n_values = integer(f"the number of calls of {name}"), integer(f"the size of {name}")
        values = torch.frombuffer(bytearray(take(4 * n_values, f"the values of {name}")), dtype=torch.float32)
        means[name] = (values / max(1, n_calls)).view(1, -1)
        counts[name] = torch.tensor([n_calls * CHUNK])
    n_chunks, datasets = 0, tuple[str, ...]()
    if position < file.size:
        n_chunks = integer("the number of chunks")
        text = take(integer("the length of the text's name"), "the text's name").decode("utf-8", "replace")
        datasets = (text,) if text else ()
    return ImportanceMatrix(means, counts, n_chunks, CHUNK, datasets)


def _legacy(matrix: ImportanceMatrix) -> bytes:
    out = bytearray(struct.pack("<i", len(matrix.means)))
    for name in sorted(matrix.means):
        raw = name.encode()
        n_calls = -(-int(matrix.counts[name].max()) // matrix.chunk_size)
        values = (matrix.means[name] * n_calls).float().contiguous().view(-1)
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", n_calls, values.numel())
        out += values.numpy().tobytes()
    text = (matrix.datasets[-1] if matrix.datasets else "").encode()
    return bytes(out + struct.pack("<ii", matrix.n_chunks, len(text)) + text)
