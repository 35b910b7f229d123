"""Many small tensor operations on several cores.

torch spreads one operation over its threads, which pays for large ones only, and Python's threads wait for each other
between the hundreds of thousands of small ones that the roundings are made of: on two cores they took longer than one
(docs/log.md). So forked processes do the work side by side, as torch's own data loaders do. Each item is computed by
one thread wherever it lands, so the results do not depend on the machine.
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


def spread(
    function: Callable[[Item], Result], items: Sequence[Item], cost: Callable[[Item], float] = lambda item: 1.0
) -> list[Result]:
    """`function` of every item, in order, on as many cores as torch may use, each item on one of them.

    What the function changes in place stays in the process that ran it: only results come back.
    cost  of an item in any unit, by which the cores are given like amounts
    Raises what the function raises.
    """
    threads = torch.get_num_threads()
    shares = _shares([cost(item) for item in items], threads if CAN_FORK else 1)
    children: list[tuple[int, int, int]] = []
    torch.set_num_threads(1)
    try:
        children = [_child(function, [items[i] for i in share]) for share in shares[1:]]
        own = [function(items[i]) for i in shares[0]]
    finally:
        torch.set_num_threads(threads)
        collected = [_collected(*child) for child in children]
    found = dict(zip(shares[0], own, strict=True))
    for share, answer in zip(shares[1:], collected, strict=True):
        if answer is None:  # done again here, where the error can be raised
            answer = [function(items[i]) for i in share]
        found.update(zip(share, answer, strict=True))
    return [found[i] for i in range(len(items))]


def _shares(costs: list[float], n: int) -> list[list[int]]:
    """Indexes for at most n workers: the dearest item first, always to the one with the least to do."""
    shares: list[list[int]] = [[] for _ in range(max(1, min(n, len(costs))))]
    load = [0.0] * len(shares)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = load.index(min(load))
        shares[least].append(i)
        load[least] += costs[i]
    return shares


def _child(function: Callable[[Item], Result], items: list[Item]) -> tuple[int, int, int]:
    """Start a process on some items: how many these are, its number, and where its results can be read."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # The warning is about locks that other threads hold; the child takes none: it computes on one thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        os.close(writer)
        return len(items), pid, reader
    status = 1
    try:
        os.close(reader)
        answers = [function(item) for item in items]
        named = {f"{i} {name}": value.contiguous() for i, each in enumerate(answers) for name, value in each.items()}
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(save(named))
        status = 0
    finally:
        os._exit(status)  # no cleanup of what belongs to the parent, no traceback


def _collected(n: int, pid: int, reader: int) -> list[Result] | None:
    """The results of n items that a process found, None when it failed."""
    with os.fdopen(reader, "rb") as pipe:
        raw = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        return None
    answers: list[Result] = [{} for _ in range(n)]
    for key, value in load(raw).items():
        i, name = key.split(" ", 1)
        answers[int(i)][name] = value
    return answers
