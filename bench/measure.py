"""Run a command and measure it from outside: wall time, peak resident memory, output."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """Wall seconds, peak resident bytes, and everything printed."""

    seconds: float
    peak_bytes: int
    output: str


def run(*command: str | Path) -> Run:
    """Run to the end. Raises RuntimeError with the output when the command fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} failed with {process.returncode}:\n{output[-2000:]}")
    return Run(time.perf_counter() - started, usage.ru_maxrss * 1024, output)


def side_by_side(commands: dict[str, Sequence[str | Path]], outputs: Sequence[Path], repeats: int) -> dict[str, Run]:
    """Run the commands in turn, `repeats` times each after one warm-up, and return medians.

    outputs  files to remove before every run
    Taking turns spreads whatever else the machine does over all of them.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for round_number in range(repeats + 1):
        for name, command in commands.items():
            for path in outputs:
                path.unlink(missing_ok=True)
            measured = run(*command)
            if round_number:
                runs[name].append(measured)
    return {
        name: Run(
            statistics.median(r.seconds for r in of_one), max(r.peak_bytes for r in of_one), of_one[-1].output
        )
        for name, of_one in runs.items()
    }
