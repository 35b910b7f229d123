"""`--ranks`: a run in several processes, started here or by torchrun.

The first rank is the command itself. Started here, the others get the model by name and wait for what it asks
(pipeline/job.py); they end with it, however it ends. Under torchrun every rank is given the same command line, and all
but the first turn into such helpers.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from whit.devices import device_named
from whit.errors import RankError
from whit.pipeline.job import dismiss
from whit.ranks import ALONE, Ranks, joined

STORE, LOST = "store", 3  # exit status of a helper whose first rank is gone
GRACE = 10.0  # seconds until a helper that is told to end must have ended
DEVICE_HELP = (
    "Where models run: cpu, cuda, cuda:1, `cuda:0,cuda:1` for ranks in turn, or auto. Rounding stays on the CPU."
)
RANKS_HELP = (
    "Share calibration and rounding out over so many processes, each with its part of the cores; the result is the "
    "same, byte for byte. For several machines see docs/scale.md (torchrun)."
)


def is_helper(rank: int) -> bool:
    """Whether this process is one that torchrun has started, and not the first. rank: what torchrun calls it."""
    return dist.is_torchelastic_launched() and rank > 0


def helped(model: str, device: str) -> None:
    """Be one of torchrun's ranks but the first, on the model with this name. device: as `device_named` reads it."""
    from whit.models.open import open_model
    from whit.pipeline.helper import help_with  # it imports transformers, which takes seconds

    with joined() as ranks:
        help_with(open_model(model), ranks, device_named(device, ranks.rank))


@contextmanager
def working(n: int, model: str, device: str) -> Iterator[Ranks]:
    """This process as the first of several, which wait for jobs while the context lasts.

    n      how many to start, this one included, when torchrun started none
    model  the name that the others open it by
    device as `device_named` reads it
    Raises RankError with what a rank said when it ended before its work was done.
    """
    if dist.is_torchelastic_launched():
        with joined() as ranks:
            yield ranks
            dismiss(ranks)
    elif n == 1:
        yield ALONE
    else:
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            store, share = str(Path(folder) / STORE), max(1, threads // n)
            setup = {"model": model, "store": store, "size": n, "threads": share, "device": device}
            helpers = [stack.enter_context(_Helper({**setup, "rank": rank})) for rank in range(1, n)]
            try:
                for helper in helpers:
                    helper.wait()
                torch.set_num_threads(share)
                with joined(dist.FileStore(store, n), 0, n) as ranks:
                    yield ranks
                    dismiss(ranks)
                for helper in helpers:
                    helper.end()
            except RankError as error:
                raise _explained(helpers) or error from error
            finally:
                torch.set_num_threads(threads)


class _Helper:
    """Another rank on this machine. Its own session: Ctrl-C reaches the first rank alone, which then ends it."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.rank, self._size = setup["rank"], setup["size"]
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "whit.cli.helper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it could not even start; `wait` says so
            self.process.stdin.write(json.dumps(setup) + "\n")
            self.process.stdin.flush()

    def wait(self) -> None:
        """Until it has opened the model. Raises RankError."""
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RankError(f"Rank {self.rank} of {self._size} did not start.")

    def end(self) -> None:
        """It has been dismissed: let it end by itself, or `failure` could not tell that from being left alone."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)

    def failure(self) -> str | None:
        """Why it ended; None while it runs, and when it only ended because others had."""
        status = self.process.poll()
        if status in (None, 0, LOST):
            return None
        self._log.seek(0)
        said = self._log.read().strip().splitlines()
        why = said[-1] if said else f"exit status {status}"
        if status < 0:
            why = f"{signal.Signals(-status).name}. When memory runs out the system does that; use fewer ranks"
        return f"Rank {self.rank} of {self._size} ended before its work was done: {why.rstrip('.')}."

    def __enter__(self) -> _Helper:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # it ends with that
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._log.close()


def _explained(helpers: list[_Helper]) -> RankError | None:
    """What the rank says that ended first. It may take a moment to be gone."""
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        said = [why for helper in helpers if (why := helper.failure())]
        if said:
            return RankError(said[0])
        time.sleep(0.05)
    return None
