"""Calibrated rounding as models grow deeper: width 2048, random weights, 4 to 32 blocks.

Memory is to stay where it is, time to grow with the number of weights; the picture is docs/images/depth.svg.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.measure import Run, run
from bench.models import wide_folder
from bench.peers import WORK
from whit.models.open import open_model

LAYERS = (4, 8, 16, 32)
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "depth.svg"


def main() -> None:
    """Print time and peak memory for every depth, and draw the time."""
    whit, out = Path(sys.executable).with_name("whit"), WORK / "out.gguf"
    print("| blocks | million weights | seconds | CPU seconds | peak resident MB |\n|---|---|---|---|---|", flush=True)
    found: list[tuple[float, Run]] = []
    for layers in LAYERS:
        folder = wide_folder(layers)
        millions = open_model(str(folder)).n_bytes / 2e6
        command = (whit, "quantize", "--no-verify", folder, "--recipe", "q4_k_m", "--preset", "fast", "-o", out)
        measured = run(*command, "--force")
        print(
            f"| {layers} | {millions:.0f} | {measured.seconds:.0f} | {measured.cpu_seconds:.0f} | "
            f"{measured.peak_bytes / 1e6:.0f} |",
            flush=True,
        )
        found.append((millions, measured))
        shutil.rmtree(folder)
    out.unlink()
    peaks = [one.peak_bytes for _, one in found]
    print(f"\nLargest peak over smallest: {max(peaks) / min(peaks):.3f}.")
    plt.rcParams |= {"svg.hashsalt": "whit", "font.size": 10}
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot([n for n, _ in found], [one.cpu_seconds for _, one in found], "o-", color="#2e8b57")
    axes.set(xlabel="million weights", ylabel="processor seconds", xlim=0, ylim=0)
    axes.grid(alpha=0.4)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
