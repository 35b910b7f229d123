"""A file of tensors that knows when it is damaged: for work in progress, which nobody but Whit reads.

    one line of JSON          names, dtypes and shapes of the tensors, and whatever else is to be said
    the tensors               little-endian, one after the other
    32 bytes                  SHA-256 of everything before

safetensors has no checksum, and its writer takes all values at once, a second copy of them in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.checkpoints.atomic import whole_file
from whit.errors import BrokenFileError

DIGEST = hashlib.sha256().digest_size  # bytes
TENSORS, SAID = "tensors", "said"


def write_checked(path: Path, said: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a whole file, or none; when this returns it survives a power cut.

    said     anything that JSON holds
    tensors  of any shape and dtype, on the CPU; each is asked for twice, and one at a time
    Raises OutputError when it cannot be written.
    """
    tensors = tensors or {}
    entries, n_bytes = [], DIGEST
    for name, value in tensors.items():
        entries.append([name, str(value.dtype).removeprefix("torch."), list(value.shape)])
        n_bytes += value.nbytes
    header = json.dumps({SAID: said, TENSORS: entries}).encode() + b"\n"
    n_bytes += len(header)
    digest = hashlib.sha256(header)
    with whole_file(path, n_bytes, overwrite=True) as file:
        file.write(header)
        for value in tensors.values():
            raw = _bytes(value.contiguous())
            digest.update(raw)
            file.write(raw)
        file.write(digest.digest())


def read_checked(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was said, and the tensors. Raises BrokenFileError when a single bit is not as it was written."""
    tensors: dict[str, Tensor] = {}
    return taken_checked(path, tensors.__setitem__), tensors


def taken_checked(path: Path, take: Callable[[str, Tensor], None]) -> dict[str, Any]:
    """What was said; `take` is given every tensor and its name, before it is known whether all is well.

    Raises BrokenFileError when a single bit is not as it was written.
    """
    try:
        with path.open("rb") as file:
            header = file.readline()
            digest = hashlib.sha256(header)
            content = json.loads(header)
            left = path.stat().st_size - len(header) - DIGEST
            for name, dtype, shape in content[TENSORS]:
                kind = getattr(torch, dtype)
                left -= math.prod(shape) * kind.itemsize
                if left < 0:  # before memory is asked for
                    raise ValueError("too short")
                value = torch.empty(shape, dtype=kind)
                raw = _bytes(value)
                if file.readinto(raw) != len(raw):
                    raise ValueError("too short")
                digest.update(raw)
                take(name, value)
            if file.read() != digest.digest():
                raise ValueError("its checksum does not fit")
            said: dict[str, Any] = content[SAID]
            return said
    except OSError as error:
        raise BrokenFileError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise BrokenFileError(f"{path}: is damaged: its checksum does not fit.") from None


def _bytes(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return value.contiguous().view(-1).view(torch.uint8).numpy().data
