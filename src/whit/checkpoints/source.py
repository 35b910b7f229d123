"""Tensors read lazily by name: the one view that every file format offers.

A source knows names, shapes and stored types from headers alone; values are read when they are asked
for and belong to the caller. Nothing is memory-mapped: pages of a mapping count as resident memory of
the process, and peak memory is a promise of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor.

    name      name in the file
    shape     dimensions in PyTorch order, outermost first
    dtype     stored type: "F32", "F16", "BF16", "Q4_0", ...
    n_bytes   bytes that its data takes in the file
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int


class TensorSource(Protocol):
    """Tensors by name; headers are checked when the source is opened, data when it is read."""

    def names(self) -> Sequence[str]:
        """All tensor names, in file order."""
        ...

    def info(self, name: str) -> TensorInfo:
        """What the header says about `name`. Raises KeyError for an unknown name."""
        ...

    def read(self, name: str) -> Tensor:
        """The values of `name` as a fresh contiguous tensor of `info(name).shape`.

        Float types come as stored (float32, float16, bfloat16); quantized types come decoded to float32.
        Raises KeyError for an unknown name and BrokenFileError when the file ends early.
        """
        ...


@runtime_checkable
class PartlyRead(Protocol):
    """A source that reads some of a tensor without reading all of it."""

    def read_some(self, name: str, start: int, n: int) -> Tensor:
        """Entries `start` to `start + n` along the first dimension, otherwise as `read` gives them."""
        ...


def read_some(source: TensorSource, name: str, start: int, n: int) -> Tensor:
    """Entries `start` to `start + n` of a tensor along its first dimension; no more is read where that is possible."""
    if isinstance(source, PartlyRead):
        return source.read_some(name, start, n)
    return source.read(name)[start : start + n]
