"""Processes that make one run together, on one machine or several: torch.distributed, and little of it.

All of them go through the same steps on the same model, each with windows of its own. What they exchange is little
beside what they compute: sums over windows, rounded matrices, decisions. All of it is sent from one rank to all, byte
for byte, and added in the order of the windows, so that the result does not depend on how many there are.
An all-reduce would add in an order of its own.

Values go through the memory of the host whatever computed them: gloo, which is everywhere, is enough.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from whit.errors import RankError
from whit.parallel import Result, spread

Item = TypeVar("Item")
MEETING = timedelta(minutes=5)  # all have started when they look for each other; one that has ended is not noticed
PATIENCE = timedelta(days=30)  # others may be long at work; one that has ended is noticed at once
SHORTEST, LONGEST = 5e-5, 0.02  # seconds between two looks


class Ranks:
    """This process among those of a run.

    rank  which it is; the first does what is done once: it writes, and tells
    size  how many there are
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def part(self, n: int, rank: int | None = None) -> range:
        """Which of n things in order are those of a rank (this one); a run of them, as many as the others have."""
        r = self.rank if rank is None else rank
        return range(n * r // self.size, n * (r + 1) // self.size)

    def said(self, value: Any, by: int = 0) -> Any:
        """What a rank says, known to all afterwards: anything that JSON holds. The others' values do not matter.

        Raises RankError when a rank has ended.
        """
        if self.size == 1:
            return value
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(raw)])
        self._moved(length, by)
        if self.rank != by:
            raw = torch.empty(int(length), dtype=torch.uint8)
        self._moved(raw, by)
        return json.loads(raw.numpy().tobytes())

    def given(self, tensors: Mapping[str, Tensor] | None, by: int = 0) -> dict[str, Tensor]:
        """Tensors of one rank, with their names, known to all afterwards.

        tensors  of any shape and dtype; those of other ranks than `by` do not matter
        Returns them on the CPU. Raises RankError when a rank has ended.
        """
        sent = dict(tensors or {}) if self.rank == by else {}
        if self.size == 1:
            return sent
        sent = {name: value.cpu().contiguous() for name, value in sent.items()}
        shapes = [[name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in sent.items()]
        for name, dtype, shape in self.said(shapes, by):
            if self.rank != by:
                sent[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            if sent[name].numel():
                self._moved(sent[name].view(-1).view(torch.uint8), by)
        return sent

    def spread(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        cost: Callable[[Item], float],
        ready: Callable[[Item], Item] = lambda item: item,
    ) -> list[Result]:
        """As `parallel.spread`, on the cores of all ranks; every rank has all results.

        ready  what is to be done before with an item, in this very process and only where it is computed; by one
               thread, as the rest is: the last bits of a factorization depend on their number
        """
        owners = shared_out([cost(item) for item in items], self.size)
        mine = [i for i, owner in enumerate(owners) if owner == self.rank]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            here = [ready(items[i]) for i in mine]
        finally:
            torch.set_num_threads(threads)
        found = dict(zip(mine, spread(function, here, cost), strict=True))
        if self.size > 1:
            own = {f"{i} {name}": value for i, result in found.items() for name, value in result.items()}
            for by in range(self.size):
                for key, value in self.given(own, by).items():
                    i, name = key.split(" ", 1)
                    found.setdefault(int(i), {})[name] = value
        return [found[i] for i in range(len(items))]

    def _moved(self, values: Tensor, by: int) -> None:
        everyone = dist.group.WORLD
        assert everyone is not None  # `joined`
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = by, PATIENCE
        try:
            work = everyone.broadcast([values], options)
            pause = SHORTEST
            while not work.is_completed():  # waiting inside would not hear Ctrl-C
                time.sleep(pause)
                pause = min(LONGEST, 2 * pause)
            work.wait()
        except RuntimeError as error:
            raise RankError(f"Another rank of {self.size} has ended before its work was done.") from error


ALONE = Ranks()


@contextmanager
def joined(store: dist.Store | None = None, rank: int = -1, size: int = -1) -> Iterator[Ranks]:
    """This process as one of several, while the context lasts.

    store  where they find each other; None when torchrun started them and says so itself
    Raises RankError when they do not.
    """
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=MEETING)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"The ranks did not find each other ({error}).") from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def shared_out(costs: Sequence[float], n: int) -> list[int]:
    """Which of n takes each item: the dearest first, each to the one that has least to do."""
    load, owners = [0.0] * n, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(n), key=lambda r: load[r])
        load[owners[i]] += costs[i]
    return owners
