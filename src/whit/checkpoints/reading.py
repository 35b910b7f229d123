"""Bounded reads from one open file: every size is compared with what is there before memory is taken for it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from whit.errors import BrokenFileError


class BoundedFile:
    """A file opened for reading at explicit offsets.

    Raises BrokenFileError when it is missing, unreadable or shorter than a read asks for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            self.size = path.stat().st_size
        except FileNotFoundError:
            raise BrokenFileError(f"{path}: no such file.") from None
        except OSError as error:
            raise BrokenFileError(f"{path}: cannot be read ({error.strerror}).") from error

    def bytes_at(self, offset: int, n_bytes: int, what: str) -> bytes:
        """`n_bytes` from `offset`; `what` names them in the error."""
        self._check(offset, n_bytes, what)
        raw = bytearray(n_bytes)
        self._fill(memoryview(raw), offset, what)
        return bytes(raw)

    def tensor_at(self, offset: int, n_bytes: int, what: str) -> Tensor:
        """The same as a fresh uint8 tensor, without an intermediate copy."""
        self._check(offset, n_bytes, what)
        raw = torch.empty(n_bytes, dtype=torch.uint8)
        self._fill(raw.numpy().data, offset, what)
        return raw

    def _fill(self, into: memoryview, offset: int, what: str) -> None:
        try:
            self._file.seek(offset)
            n_bytes = self._file.readinto(into) if into.nbytes else 0
        except OSError as error:  # not to be taken for one of the file that is being written
            raise BrokenFileError(
                f"{self.path}: {what} cannot be read ({error.strerror or error}). Check the disk, or get it anew."
            ) from error
        if n_bytes != into.nbytes:
            raise BrokenFileError(f"{self.path}: became shorter while {what} was read. Is it still being written?")

    def _check(self, offset: int, n_bytes: int, what: str) -> None:
        if offset + n_bytes > self.size:
            raise BrokenFileError(
                f"{self.path}: truncated. {what} ends at byte {offset + n_bytes:,} but the file has "
                f"{self.size:,}. Download or copy it again."
            )

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        self._file.close()

    def __enter__(self) -> BoundedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
