"""What is lost at which size: points, and the picture of them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whit.checkpoints.atomic import whole_file
from whit.errors import MissingPackageError
from whit.evaluation.divergence import Comparison

Size = tuple[float, float]
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
    return save_figure(frontier(points, title), folder, "frontier")


def frontier(points: Sequence[Point], title: str = "", names: Sequence[str] = (), size: Size = (7, 4.2)) -> Any:
    """Divergence over size as a matplotlib Figure, two standard errors either way.

    A line per maker goes through the points that no other of that maker beats; the rest are hollow.
    names  written beside the points, in their order; none for none
    size   width and height in inches
    Raises MissingPackageError without matplotlib.
    """
    drawing()
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    makers = list(dict.fromkeys(point.by for point in points))
    for k, by in enumerate(makers):
        mine = sorted((point for point in points if point.by == by), key=lambda point: point.n_bytes)
        marker, colour = STYLES[k % len(STYLES)]
        least, best = math.inf, []
        for point in mine:
            lost, x = point.result.kl_mean, point.n_bytes / 1e6
            hollow = lost >= least
            best += [] if hollow else [(x, lost)]
            least = min(least, lost)
            error = min(2 * point.result.kl_mean_se, 0.9 * lost)  # a logarithm has no place for zero
            face = "none" if hollow else colour
            axes.errorbar(x, lost, error, color=colour, marker=marker, markerfacecolor=face, linewidth=1, capsize=2)
        axes.plot(*zip(*best, strict=True), color=colour, marker=marker, markersize=0, linewidth=1)
        axes.plot([], [], color=colour, marker=marker, linewidth=1, label=by)
    for point, name in zip(points, names, strict=False):
        right, above = _right_half(point, points), _above_neighbour(point, points)
        axes.annotate(
            name,
            (point.n_bytes / 1e6, point.result.kl_mean),
            (-6 if right else 6, 4 if above else -4),
            textcoords="offset points",
            ha="right" if right else "left",
            va="bottom" if above else "top",
            parse_math=False,
        )
    axes.set(yscale="log", xlabel="file size, MB", ylabel="mean KL divergence from the original, nats")
    axes.set_title(title, parse_math=False)
    axes.margins(0.1)
    axes.grid(which="major", alpha=0.4)
    if len(makers) > 1:
        axes.legend(frameon=False)
    return figure


def save_figure(figure: Any, folder: Path, name: str) -> list[Path]:
    """A matplotlib Figure as NAME.png and NAME.svg in `folder`. Raises OutputError when they cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    FigureCanvasAgg(figure)
    _save(figure, paths[0], dpi=110)
    FigureCanvasSVG(figure)
    _save(figure, paths[1], metadata={"Date": None})
    return paths


def _above_neighbour(point: Point, points: Sequence[Point]) -> bool:
    """Whether it loses more than the point next in size, whose name may be near."""
    others = [each for each in points if each is not point]
    nearest = min(others, key=lambda each: abs(each.n_bytes - point.n_bytes), default=point)
    return point.result.kl_mean >= nearest.result.kl_mean


def _right_half(point: Point, points: Sequence[Point]) -> bool:
    sizes = [each.n_bytes for each in points]
    return point.n_bytes > (min(sizes) + max(sizes)) / 2


def drawing() -> None:
    """Raise MissingPackageError when the library that `draw` needs is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("Drawing needs matplotlib: pip install 'whit[plots]'.")


def _save(figure: Any, path: Path, **options: Any) -> None:
    from matplotlib import rc_context

    with whole_file(path, 0, overwrite=True) as file, rc_context({"svg.hashsalt": "whit"}):  # the same bytes every time
        figure.savefig(file, format=path.suffix[1:], **options)
