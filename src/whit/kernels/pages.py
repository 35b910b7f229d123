"""Tensors one after the other on large pages, so that reading them does not wait for addresses to be looked up.

A product reads its matrix once. On pages of 4 KiB each starts with a walk through tables that are long out of the cache
by then, in virtual machines two walks; a page of 2 MiB needs one for 500 of those. Few matrices fill even one such
page, so that those of a model have to share them, while to torch each stays a tensor with a storage of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 1 << 21
ALIGN = 64


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors on the CPU, where the system has large pages; else, and for less than two pages of them in all,
    the tensors themselves.

    The memory is given back when the last copy is gone. Nothing but speed depends on it.
    """
    places, n_bytes = [], 0
    for tensor in tensors:
        places.append(n_bytes)
        n_bytes += -(-tensor.nbytes // ALIGN) * ALIGN
    if sys.platform != "linux" or n_bytes < 2 * PAGE:
        return list(tensors)
    region = _region(n_bytes)
    return [_copied(each, region[at : at + each.nbytes]) for each, at in zip(tensors, places, strict=True)]


def _region(n_bytes: int) -> memoryview:
    """Memory that begins with a large page. It is there when it is written to."""
    memory = mmap.mmap(-1, n_bytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    first = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE
    return memoryview(memory)[first : first + n_bytes]


def _copied(tensor: Tensor, to: memoryview) -> Tensor:
    if not tensor.nbytes:
        return tensor
    held = torch.frombuffer(to, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    held.copy_(tensor)
    return held
