"""The same bytes with 1, 2 and 4 ranks, and what they gain: `python -m bench.ranks [MODEL] [--ranks 1 2 4]`.

Every rank computes on one thread. On a machine with other work the wall time says little; the processor time of the
first rank is about what the run takes with a core for each.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import time

from bench.peers import WORK

COMMAND = """
import resource, sys
from whit.cli.app import run
status = run(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print("first rank:", used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


def main() -> None:
    """One row per number of ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--recipe", default="q4_0")
    parser.add_argument("--rounding", default="feedback")
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print("| ranks | wall, s | processor, s: first | all | MB of the first | SHA-256 |\n|---|---|---|---|---|---|")
    for n in arguments.ranks:
        out = WORK / f"ranks-{n}"
        whit = [
            sys.executable,
            "-c",
            COMMAND,
            "quantize",
            arguments.model,
            "--recipe",
            arguments.recipe,
            "-o",
            str(out),
        ]
        whit += ["--rounding", arguments.rounding, "--preset", "fast", "--windows", str(arguments.windows)]
        whit += ["--ranks", str(n), "--no-verify", "--force"]
        started, before = time.perf_counter(), _children()
        found = subprocess.run(
            whit,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        wall, used = time.perf_counter() - started, _children() - before
        first, memory = map(float, found.stderr.decode().rsplit("first rank:", 1)[1].split())
        digest = hashlib.sha256(out.read_bytes()).hexdigest()[:16]
        print(f"| {n} | {wall:.0f} | {first:.0f} | {used:.0f} | {memory / 1e3:.0f} | {digest} |", flush=True)


def _children() -> float:
    """Processor seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
