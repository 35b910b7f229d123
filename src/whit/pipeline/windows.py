"""Hidden states of the windows of a text: in memory, or in a file where memory is short.

One window is in work at a time. What is in a file is read and written whole, window by window: mapped pages would count
as memory of the process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from whit.errors import OutputError


class Windows(Protocol):
    """Tensors [1, length, hidden] of one shape; a list is one."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, n: int, /) -> Tensor:
        """One of them."""
        ...

    def __setitem__(self, n: int, window: Tensor, /) -> None:
        """Another in its place."""
        ...

    def append(self, window: Tensor, /) -> None:
        """One more."""
        ...

    def clear(self) -> None:
        """None any more."""
        ...


class Spilled:
    """Windows in a file without a name, which is gone when nobody holds this any more, whatever happens."""

    def __init__(self, folder: Path) -> None:
        """folder  on whose disk. Raises OutputError when nothing can be written there."""
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  lives as long as this
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written ({error.strerror or error}).") from error
        self._n, self._like, self._folder = 0, torch.empty(0), folder

    def __len__(self) -> int:
        """How many there are."""
        return self._n

    def __getitem__(self, n: int, /) -> Tensor:
        """One of them, read anew."""
        if not 0 <= n < self._n:
            raise IndexError(n)  # ends a loop over this
        window = torch.empty(self._like.shape, dtype=self._like.dtype)
        self._file.seek(n * self._like.nbytes)
        if self._file.readinto(_bytes(window)) != window.nbytes:
            raise OutputError(f"{self._folder}: hidden states that were written there cannot be read again.")
        return window

    def __setitem__(self, n: int, window: Tensor, /) -> None:
        """Another in its place. Raises OutputError when the disk is full."""
        try:
            self._file.seek(n * window.nbytes)
            self._file.write(_bytes(window))
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"{self._folder}: hidden states cannot be written ({error.strerror or error}). Make room for "
                f"{window.nbytes / 1e6:.0f} MB per window, or allow more --ram."
            ) from error

    def append(self, window: Tensor, /) -> None:
        """One more."""
        self._like = torch.empty(window.shape, dtype=window.dtype, device="meta")
        self[self._n] = window
        self._n += 1

    def clear(self) -> None:
        """None any more; their disk space is free."""
        self._file.truncate(0)
        self._n = 0


def _bytes(window: Tensor) -> memoryview:
    return window.contiguous().view(-1).view(torch.uint8).numpy().data
