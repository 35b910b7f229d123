"""The pictures of a report: what is lost at which size, token by token, and matrix by matrix.

Each is drawn once, as a matplotlib Figure. Files get it as it is; a page gets the same drawing as SVG whose ink is the
page's own, so that it can be read on a dark page too.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from whit.evaluation.frontier import Point, drawing, frontier, save_figure
from whit.report.facts import FileFacts, Matrix, Report, by_size

WIDTH = 5.2  # inches; at the width of a phone, letters are not much smaller than those of the text
NAME = 30  # characters of a name that a picture has room for
FILL, LINE, EDGE = "#4a8fa8", "#b5651d", "#7f7f7f"
SMALLEST = 1e-7  # nats; less is drawn as this
BINS = 60
COLOURS, SHADES = "cividis", 24  # lightness grows evenly, for every kind of sight and without colour
Range = tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """A drawing.

    name     of its files, without a suffix
    figure   matplotlib's
    says     what it shows, for those who do not see it
    file     index of the file that it is of, None when it is of all
    """

    name: str
    figure: Any
    says: str
    file: int | None = None


def pictures(report: Report) -> tuple[Picture, ...]:
    """All that can be drawn: "frontier" and "tokens" of the measured files, "layers-..." of each that was read.

    Raises MissingPackageError without matplotlib.
    """
    drawing()
    drawn = []
    with _quiet():
        if placed := [
            each for each in report.files if each.verified.result and 0 < each.verified.result.kl_mean < math.inf
        ]:
            drawn.append(Picture("frontier", _frontier(placed), _frontier_says(placed)))
        if measured := [each for each in by_size(report.files) if each.tokens is not None]:
            drawn.append(Picture("tokens", _tokens(measured), _tokens_says(measured)))
        errors = [each.error for file in report.files for each in _layered(file) if 0 < each.error < math.inf]
        bits = [each.bits for file in report.files for each in _layered(file) if each.bits > 0]
        scales = (min(errors, default=1e-3), max(errors, default=1.0)), (min(bits, default=0), max(bits, default=16))
        for index, (file, name) in enumerate(zip(report.files, _file_names(report.files), strict=True)):
            if inside := _layered(file):
                figure = _layers(file.name, inside, *scales)
                drawn.append(Picture(f"layers-{name}", figure, _layers_says(file.name, inside), index))
        for each in drawn:
            each.figure.draw_without_rendering()
            each.figure.set_layout_engine("none")  # places are found once, or they move a little with every drawing
    return tuple(drawn)


def picture_names(names: Sequence[str]) -> list[str]:
    """File names (without suffix) of all pictures that a report on files of these names may have."""
    return ["frontier", "tokens", *(f"layers-{name}" for name in _plain_names(names))]


def save_pictures(drawn: Sequence[Picture], folder: Path) -> list[Path]:
    """PNG and SVG files. Raises OutputError."""
    with _quiet():
        return [path for each in drawn for path in save_figure(each.figure, folder, each.name)]


def inline(picture: Picture) -> Markup:
    """The picture as an <svg> element for a page: text stays text, black is the page's colour, nothing behind it."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(picture.figure)
    text = StringIO()
    with _quiet(), rc_context({"svg.fonttype": "none", "svg.hashsalt": "whit"}):
        picture.figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head, body = svg[: svg.index(">") + 1], svg[svg.index(">") + 1 :]
    view = re.search(r'viewBox="[-0-9. ]+"', head)
    own = re.sub(r"[^a-z0-9]+", "-", picture.name.lower()) + (f"-{picture.file}" if picture.file is not None else "")
    body = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', f"{own}-", body)  # several on one page
    body = body.replace("#000000", "currentColor").replace("xlink:href", "href")
    label = escape(picture.says)
    return Markup(f'<svg role="img" aria-label="{label}" {view[0] if view else ""}>{body}')


def _frontier(files: Sequence[FileFacts]) -> Any:
    points = [
        Point("", each.name, each.n_bytes, each.bits_per_weight or 0.0, each.verified.result)
        for each in files
        if each.verified.result is not None
    ]
    return frontier(points, names=[_brief(each.name) for each in files], size=(WIDTH, 3.8))


def _frontier_says(files: Sequence[FileFacts]) -> str:
    points = [
        f"{each.name}: {each.n_bytes / 1e6:.1f} MB, {each.verified.result.kl_mean:.3g} nats"
        for each in by_size(files)
        if each.verified.result is not None
    ]
    return "Mean divergence over file size. " + "; ".join(points) + "."


def _tokens(files: Sequence[FileFacts]) -> Any:
    from matplotlib.figure import Figure

    values = {
        each.name: each.tokens.kl.clamp_min(SMALLEST).log10().numpy() for each in files if each.tokens is not None
    }
    low = min(float(each.min()) for each in values.values())
    high = max(float(each[each < math.inf].max(initial=low + 1)) for each in values.values())
    figure = Figure(figsize=(WIDTH, 0.7 + 0.85 * len(files)), layout="constrained")
    rows = figure.subplots(len(files), 1, sharex=True, squeeze=False)[:, 0]
    for axes, file in zip(rows, files, strict=True):
        axes.hist(values[file.name], BINS, (math.floor(low), math.ceil(high)), color=FILL)
        result = file.verified.result
        if result is not None:
            for value, style in ((result.kl_median, "-"), (result.kl_p99, "--")):
                axes.axvline(math.log10(max(value, SMALLEST)), color=LINE, linestyle=style, linewidth=1.5)
        axes.set_title(_brief(file.name), loc="left", fontsize=10, pad=3, parse_math=False)
        axes.set_yticks([])
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
    rows[-1].set_xlabel("KL divergence of a token, nats; median (line) and 99 % (dashes)")
    ticks = range(math.floor(low), math.ceil(high) + 1)
    step = max(1, len(ticks) // 6)
    rows[-1].set_xticks(list(ticks)[::step], [_power(k) for k in list(ticks)[::step]])
    return figure


def _tokens_says(files: Sequence[FileFacts]) -> str:
    parts = [
        f"{each.name}: half of the tokens below {each.verified.result.kl_median:.2g} nats, 99 % below "
        f"{each.verified.result.kl_p99:.2g}"
        for each in files
        if each.verified.result is not None
    ]
    return "Histograms of the divergence per token, a row per file. " + "; ".join(parts) + "."


def _layers(name: str, matrices: Sequence[Matrix], scale: Range, widths: Range) -> Any:
    """scale, widths: least and most of the errors and of the bits per weight, of all files"""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from numpy import full, nan

    roles = list(dict.fromkeys(each.role for each in matrices))
    n_layers = 1 + max(each.block or 0 for each in matrices)
    errors, bits = full((2, len(roles), n_layers), nan)
    for each in matrices:
        errors[roles.index(each.role), each.block or 0] = each.error if 0 < each.error < math.inf else nan
        bits[roles.index(each.role), each.block or 0] = each.bits
    figure = Figure(figsize=(WIDTH, 1.3 + 0.42 * len(roles)), layout="constrained")
    figure.suptitle(_brief(name), x=0.01, ha="left", fontsize=11, parse_math=False)
    colours = colormaps[COLOURS].resampled(SHADES)
    low, high = math.floor(widths[0]), max(math.ceil(widths[1]), math.floor(widths[0]) + 1)
    panels: tuple[tuple[Any, Any, str, Mapping[Any, str]], ...] = (
        (errors, LogNorm(scale[0] * 0.999, scale[1] * 1.001), "relative error", _percents(*scale)),
        (
            bits,
            Normalize(low, high),
            "bits per weight",
            {k: str(k) for k in range(low, high + 1, max(1, (high - low) // 4))},
        ),
    )
    for axes, (values, norm, title, ticks) in zip(figure.subplots(2, 1, sharex=True), panels, strict=True):
        mesh = axes.pcolormesh(values, cmap=colours, norm=norm, edgecolors="face", linewidth=0.3)
        axes.invert_yaxis()
        axes.set_yticks([k + 0.5 for k in range(len(roles))], [_brief(role) for role in roles], parse_math=False)
        axes.set_title(title, loc="left", fontsize=10, pad=3)
        bar = figure.colorbar(mesh, ax=axes, aspect=9)
        bar.minorticks_off()
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
        bar.outline.set_edgecolor(EDGE)
    for each in matrices:
        if each.fault:
            at = ((each.block or 0) + 0.5, roles.index(each.role) + 0.5)
            figure.axes[0].text(*at, "×", color=LINE, weight="bold", ha="center", va="center", fontsize=14)
    step = max(1, math.ceil(n_layers / 10))
    figure.axes[1].set_xticks([k + 0.5 for k in range(0, n_layers, step)], [str(k) for k in range(0, n_layers, step)])
    figure.axes[1].set_xlabel("layer")
    return figure


def _layers_says(name: str, matrices: Sequence[Matrix]) -> str:
    finite = [each for each in matrices if math.isfinite(each.error)]
    says = f"{name}: a map of layers and kinds of matrices, by relative error and by bits per weight."
    if not finite:
        return says
    least, most = min(finite, key=lambda each: each.error), max(finite, key=lambda each: each.error)
    says += f" Errors go from {least.error:.2%} in {least.name} to {most.error:.1%} in {most.name}."
    faults = [each.name for each in matrices if each.fault]
    return says + (f" Faults in {', '.join(faults[:5])}." if faults else "")


def _layered(file: FileFacts) -> list[Matrix]:
    return [each for each in file.matrices if each.block is not None]


def _file_names(files: Sequence[FileFacts]) -> list[str]:
    return _plain_names([each.name for each in files])


def _plain_names(names: Sequence[str]) -> list[str]:
    """Letters that every file system takes; numbered where they would be the same."""
    plain = [re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".")[:60] for name in names]
    alike: Mapping[str, int] = {name: plain.count(name) for name in plain}
    return [f"{name}-{k}" if alike[name] > 1 or not name else name for k, name in enumerate(plain, 1)]


def _percents(low: float, high: float) -> dict[float, str]:
    """Places on a logarithmic scale, and what stands there."""
    within = [k * 10.0**power for power in range(-6, 1) for k in (1, 2, 5) if low <= k * 10.0**power <= high]
    places = within[:: max(1, len(within) // 5)] or [low, high]
    return {place: f"{100 * place:.2g} %" for place in places}


def _brief(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME // 2]}…{name[1 - NAME // 2 :]}"


def _power(k: int) -> str:
    return f"{10.0**k:g}" if k >= -4 else f"1e{k}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about letters that the font of pictures lacks: they are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield
