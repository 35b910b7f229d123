"""What is lost at which size: points, and the picture of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whit.checkpoints.atomic import whole_file
from whit.errors import MissingPackageError
from whit.evaluation.divergence import Comparison

STYLES = (("o", "#2e8b57"), ("s", "#9a6a3a"), ("D", "#4a6fa5"), ("^", "#a54a6f"))


@dataclass(frozen=True)
class Point:
    """One file that was measured.

    by      who made it, for the legend
    name    of the file
    result  beside the original
    """

    by: str
    name: str
    n_bytes: int
    bits_per_weight: float
    result: Comparison


def draw(points: Sequence[Point], title: str, folder: Path) -> list[Path]:
    """Divergence over size, one line per maker, as frontier.png and frontier.svg in `folder`.

    Raises MissingPackageError without matplotlib, OutputError when they cannot be written.
    """
    drawing()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for k, by in enumerate(dict.fromkeys(point.by for point in points)):
        mine = sorted((point for point in points if point.by == by), key=lambda point: point.n_bytes)
        marker, colour = STYLES[k % len(STYLES)]
        sizes, lost = [point.n_bytes / 1e6 for point in mine], [point.result.kl_mean for point in mine]
        axes.plot(sizes, lost, color=colour, marker=marker, label=by, linewidth=1)
    axes.set(yscale="log", xlabel="file size, MB", ylabel="mean KL divergence from the original, nats", title=title)
    axes.margins(0.08)
    axes.grid(which="major", alpha=0.4)
    axes.legend(frameon=False)
    paths = [folder / "frontier.png", folder / "frontier.svg"]
    FigureCanvasAgg(figure)
    _save(figure, paths[0], dpi=110)
    FigureCanvasSVG(figure)
    _save(figure, paths[1], metadata={"Date": None})
    return paths


def drawing() -> None:
    """Raise MissingPackageError when the library that `draw` needs is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("Drawing needs matplotlib: pip install 'whit[plots]'.")


def _save(figure: Any, path: Path, **options: Any) -> None:
    import matplotlib

    # A salt of its own, or every picture would have other identifiers in it.
    with whole_file(path, 0, overwrite=True) as file, matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(file, format=path.suffix[1:], **options)
