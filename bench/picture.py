"""The picture of the README: divergence against size, from the points that quality.py measured."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.peers import WORK

IMAGES = Path(__file__).parent.parent / "docs" / "images"
STYLES = {
    "llama.cpp": ("o", "#9a6a3a", "llama.cpp's quantizer"),
    "nearest": ("s", "#4a6fa5", "Whit, nearest"),
    "search": ("D", "#2e8b57", "Whit, search"),
}


def main() -> None:
    """Write docs/images/kl-by-size.svg and .png."""
    points = json.loads((WORK / "quality.json").read_text())
    plt.rcParams |= {"svg.hashsalt": "whit", "font.size": 10}  # the same points give the same bytes
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for by, (marker, colour, label) in STYLES.items():
        mine = sorted((p for p in points if p["by"] == by), key=lambda p: (p["bytes"], p["kl"]))
        size = 70 if by == "llama.cpp" else 28
        axes.scatter(
            [p["bytes"] / 1e6 for p in mine],
            [p["kl"] for p in mine],
            size,
            colour,
            marker=marker,
            label=label,
            zorder=3,
        )
    for recipe in {p["recipe"] for p in points}:
        best = min((p for p in points if p["recipe"] == recipe), key=lambda p: p["kl"])
        axes.annotate(
            recipe,
            (best["bytes"] / 1e6, best["kl"]),
            (8, -2),
            textcoords="offset points",
            ha="left",
            va="top",
        )
    axes.set(
        yscale="log",
        xlabel="file size, MB",
        ylabel="mean KL divergence from the original, nats",
        title="SmolLM2-135M: what is lost at which size (lower left is better)",
    )
    axes.margins(0.12)
    axes.grid(which="major", alpha=0.4)
    axes.legend(frameon=False)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "kl-by-size.svg", metadata={"Date": None})
    figure.savefig(IMAGES / "kl-by-size.png", dpi=110)


if __name__ == "__main__":
    main()
