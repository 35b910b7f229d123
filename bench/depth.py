"""Memory of calibrated rounding as models grow deeper: width 2048, random weights, 4 layers and 16."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from bench.measure import run
from bench.models import wide_folder
from bench.peers import WORK

LAYERS = (4, 16)


def main() -> None:
    """Print time and peak memory for every depth."""
    whit, out = Path(sys.executable).with_name("whit"), WORK / "out.gguf"
    print("| layers | seconds | peak resident memory |\n|---|---|---|", flush=True)
    for layers in LAYERS:
        folder = wide_folder(layers)
        measured = run(
            whit, "quantize", "--no-verify", folder, "--recipe", "q4_k_m", "--preset", "fast", "-o", out, "--force"
        )
        print(f"| {layers} | {measured.seconds:.0f} | {measured.peak_bytes / 1e6:.0f} MB |", flush=True)
        shutil.rmtree(folder)
    out.unlink()


if __name__ == "__main__":
    main()
