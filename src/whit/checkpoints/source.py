"""Tensors read lazily by name: the one view that every file format offers.

A source knows names, shapes and stored types from headers alone; values are read when they are asked
for and belong to the caller. Nothing is memory-mapped: pages of a mapping count as resident memory of
the process, and peak memory is a promise of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
