"""What `whit plan` foretells beside what happens: bytes, memory, time.

Each job is forecast and run one right after the other, because other work on the machine moves the clock; seconds of
processors stand beside those of the clock. Threads are torch's own choice: OMP_NUM_THREADS changes both sides.

    python -m bench.plan [JOB ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from bench.measure import run
from bench.models import MODEL, wide_folder
from bench.peers import WORK

WHIT = (sys.executable, "-c", "import sys; from whit.cli.app import run; sys.exit(run(sys.argv[1:]))")
WIDE = WORK / "wide-4"
JOBS: dict[str, tuple[str, ...]] = {
    "q4_k_m": (MODEL, "--recipe", "q4_k_m", "--preset", "fast"),
    "gptq": (MODEL, "--recipe", "gptq-4bit-g64", "--windows", "16"),
    "wide": (str(WIDE), "--recipe", "q4_0", "--rounding", "nearest"),
    "wide-fast": (str(WIDE), "--recipe", "q4_0", "--preset", "fast", "--windows", "4"),
}
TRAININGS = {"tune": (MODEL, "gptq-3bit-g64", "128"), "wide-tune": (str(WIDE), "gptq-4bit-g64", "8")}  # recipe, windows


def main() -> None:
    """Measure the jobs that were asked for, or all but trainings, which take hours."""
    names = sys.argv[1:] or list(JOBS)
    if any(name.startswith("wide") for name in names):
        wide_folder(4)
    out = WORK / "planned"
    print("| job | | bytes | peak MB | seconds | of processors | load |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        if name in TRAININGS:
            model, recipe, windows = TRAININGS[name]
            asked: tuple[str, ...] = (model, "--recipe", recipe, "--windows", windows, "--tune")
            command: tuple[str, ...] = ("tune", model, "--qat", recipe, "--windows", windows)
        else:
            asked, command = JOBS[name], ("quantize", *JOBS[name])
        job = " ".join(each.replace(str(WIDE), "wide-4") for each in asked)
        planned = run(*WHIT, "plan", *asked, "--out", out, "--json")
        said = json.loads(planned.output)["recipes"][0]
        _row(f"`{job}`", "forecast", said["bytes"], said["ram_bytes"], said["seconds"], said["cpu_seconds"])
        done = run(*WHIT, *command, "--out", out, "--force")
        files = [out] if out.is_file() else list(out.glob("*.safetensors"))
        n_bytes = sum(file.stat().st_size for file in files)
        load = os.getloadavg()[0]
        _row("", "measured", n_bytes, done.peak_bytes, done.seconds, done.cpu_seconds, f"{load:.1f}")
        wrong = (
            said["bytes"] - n_bytes,
            *(
                f"{100 * (ours / theirs - 1):+.0f} %"
                for ours, theirs in (
                    (said["ram_bytes"], done.peak_bytes),
                    (said["seconds"], done.seconds),
                    (said["cpu_seconds"], done.cpu_seconds),
                )
            ),
        )
        print(f"| | off by | {' | '.join(map(str, wrong))} | |", flush=True)
        print(
            f"| | the forecast itself | | {planned.peak_bytes / 1e6:.0f} | {planned.seconds:.0f} | "
            f"{planned.cpu_seconds:.0f} | |",
            flush=True,
        )
        _remove(out)


def _row(job: str, what: str, n_bytes: int, peak: float, seconds: float, cpu: float, load: str = "") -> None:
    print(f"| {job} | {what} | {n_bytes:,} | {peak / 1e6:,.0f} | {seconds:.0f} | {cpu:.0f} | {load} |", flush=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink()


if __name__ == "__main__":
    main()
