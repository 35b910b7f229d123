"""Run a command and measure it from outside: wall time, peak resident memory, output."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A process starts with its parent's peak memory on its account, so the parent of what is measured must be small.
_WRAPPER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
output = process.stdout.read()
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps([seconds, cpu, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status), output]))
"""


@dataclass(frozen=True)
class Run:
    """Wall seconds, seconds of processors, peak resident bytes, and everything printed."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> Run:
    """Run to the end. Raises RuntimeError with the output when the command fails."""
    wrapped = [sys.executable, "-S", "-c", _WRAPPER, *map(str, command)]
    done = subprocess.run(wrapped, check=True, capture_output=True, text=True, env=env)
    seconds, cpu_seconds, peak_bytes, status, output = json.loads(done.stdout)
    if status:
        raise RuntimeError(f"{command} failed with {status}:\n{output[-2000:]}")
    return Run(seconds, cpu_seconds, peak_bytes, output)


def side_by_side(commands: dict[str, Sequence[str | Path]], outputs: Sequence[Path], repeats: int) -> dict[str, Run]:
    """Run the commands in turn, `repeats` times each after one warm-up; median time, largest peak.

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
            statistics.median(r.seconds for r in of_one),
            statistics.median(r.cpu_seconds for r in of_one),
            max(r.peak_bytes for r in of_one),
            of_one[-1].output,
        )
        for name, of_one in runs.items()
    }
