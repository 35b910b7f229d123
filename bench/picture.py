"""The picture of the README: divergence against size, from the points that budget.py measured."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.peers import WORK

IMAGES = Path(__file__).parent.parent / "docs" / "images"
STYLES = {
    "llama.cpp": ("o", "#9a6a3a", "llama.cpp, every type, importance matrix"),
    "Whit": ("D", "#2e8b57", "Whit, --fit"),
}
MODEL = "smollm2-135m"
# There is room for these names.
NAMED = ("IQ2_XXS", "IQ2_M", "IQ3_XXS", "IQ4_XS", "Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


def main() -> None:
    """Write docs/images/kl-by-size.svg and .png."""
    points = json.loads((WORK / f"budget-{MODEL}.json").read_text())["points"]
    plt.rcParams |= {"svg.hashsalt": "whit", "font.size": 10}  # the same points give the same bytes
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for by, (marker, colour, label) in STYLES.items():
        mine = sorted((p for p in points if p["by"] == by), key=lambda p: (p["bytes"], p["kl"]))
        sizes, lost = [p["bytes"] / 1e6 for p in mine], [p["kl"] for p in mine]
        axes.scatter(sizes, lost, 28, colour, marker=marker, label=label, zorder=3)
        if by == "Whit":
            axes.plot(sizes, lost, color=colour, linewidth=1)
            continue
        for p in mine:
            if p["name"] in NAMED:
                at = (p["bytes"] / 1e6, p["kl"])
                axes.annotate(p["name"], at, (6, 4), textcoords="offset points", fontsize=7)
    axes.set(
        yscale="log",
        xlabel="file size, MB",
        ylabel="mean KL divergence from the original, nats",
        title="SmolLM2-135M: what is lost at which size (lower left is better)",
    )
    axes.margins(0.08)
    axes.grid(which="major", alpha=0.4)
    axes.legend(frameon=False)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "kl-by-size.svg", metadata={"Date": None})
    figure.savefig(IMAGES / "kl-by-size.png", dpi=110)


if __name__ == "__main__":
    main()
