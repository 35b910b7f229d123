"""Many small tensor operations on several cores.

torch spreads one operation over its threads, which pays for large ones only, and Python's threads wait for each other
between the hundreds of thousands of small ones that the roundings are made of: on two cores they took longer than one
(docs/log.md). So forked processes do the work side by side, as torch's own data loaders do, each taking the next item
when it is done with one. An item is computed by one thread wherever it lands, so that results do not depend on the
number of processes.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

Item = TypeVar("Item")
Result = dict[str, Tensor]

CAN_FORK = sys.platform == "linux"  # elsewhere forked processes may not use the system's libraries
MOST = 1 << 14  # indexes of four bytes that a pipe holds
INDEX = 4


def spread(
    function: Callable[[Item], Result], items: Sequence[Item], cost: Callable[[Item], float] = lambda item: 1.0
) -> list[Result]:
    """`function` of every item, in order, on as many cores as torch may use, each item on one of them.

    What the function changes in place stays in the process that ran it: only results come back.
    function  gives at least one tensor
    cost      of an item in any unit; the dearest are begun first
    Raises what the function raises.
    """
    threads = torch.get_num_threads()
    n = min(threads, len(items)) if CAN_FORK and len(items) <= MOST else 1
    torch.set_num_threads(1)
    try:
        if n <= 1:
            return [function(item) for item in items]
        todo, filled = os.pipe()
        order = sorted(range(len(items)), key=lambda i: -cost(items[i]))
        os.write(filled, b"".join(i.to_bytes(INDEX, "little") for i in order))
        os.close(filled)
        children: list[tuple[int, int]] = []
        try:
            children = [_child(function, items, todo) for _ in range(n - 1)]
            found = _worked(function, items, todo)
        finally:
            while os.read(todo, INDEX * MOST):  # after an error or an interrupt nobody begins another item
                pass
            os.close(todo)
            collected = [_collected(*child) for child in children]
        for each in collected:
            found |= each
        # what a process did not finish is done again here, where its error can be raised
        return [found[i] if i in found else function(item) for i, item in enumerate(items)]
    finally:
        torch.set_num_threads(threads)


def _worked(function: Callable[[Item], Result], items: Sequence[Item], todo: int) -> dict[int, Result]:
    """Results of the items whose indexes this process got to read."""
    found = {}
    while index := os.read(todo, INDEX):
        i = int.from_bytes(index, "little")
        found[i] = function(items[i])
    return found


def _child(function: Callable[[Item], Result], items: Sequence[Item], todo: int) -> tuple[int, int]:
    """Start a process: its number, and where its results can be read."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # The warning is about locks that other threads hold; the child takes none: it computes on one thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 1
    try:
        os.close(reader)
        found = _worked(function, items, todo)
        named = {}
        for i, each in found.items():
            for name, value in each.items():
                kind = str(value.dtype).removeprefix("torch.")
                small = value.dtype.itemsize == 1  # as bytes: not every such type can be read back
                named[f"{i} {kind} {name}"] = value.contiguous().view(torch.uint8 if small else value.dtype)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(save(named))
        status = 0
    finally:
        os._exit(status)  # no cleanup of what belongs to the parent, no traceback


def _collected(pid: int, reader: int) -> dict[int, Result]:
    """Results of the items that a process did; none when it failed."""
    with os.fdopen(reader, "rb") as pipe:
        raw = pipe.read()
    _, status = os.waitpid(pid, 0)
    found: dict[int, Result] = {}
    if not status:
        for key, value in load(raw).items():
            i, kind, name = key.split(" ", 2)
            found.setdefault(int(i), {})[name] = value.view(getattr(torch, kind))
    return found
