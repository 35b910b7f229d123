"""A report as one page that needs nothing else: no network, no scripts, no fonts, no other files.

Names of files and generated texts are other people's. The template escapes everything, nothing on the page can run or
load (a content policy says so to the browser), and texts cannot turn the direction of what is around them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from whit.evaluation.verdict import LIMITS
from whit.report.advice import advice, size
from whit.report.facts import Coverage, Report, by_size
from whit.report.pictures import Picture, inline

TEMPLATE = "page.html.jinja"
MOST_FAULTS = 12  # shown of one file
MOST_NUMBERS = 12  # of experts, shown one by one


@dataclass(frozen=True)
class Experts:
    """What the experts of one kind of matrices in a layer were given, in tokens."""

    name: str
    n: int
    least: int
    median: float
    most: int
    unseen: str


def page(report: Report, drawn: Sequence[Picture]) -> str:
    """The page, as HTML. drawn: `pictures` of the same report."""
    coverage = report.coverage
    by_name = {each.name: inline(each) for each in drawn if each.file is None}
    of_file = {each.file: inline(each) for each in drawn if each.file is not None}
    layered = [(file, of_file.get(k)) for k, file in enumerate(report.files) if file.matrices]
    told = [file for file in report.files if file.origin or file.calibration]
    sections = [
        ("advice", "Advice", True),
        ("files", "The files", True),
        ("frontier", "Loss over size", "frontier" in by_name),
        ("tokens", "Token by token", "tokens" in by_name),
        ("layers", "Layer by layer", bool(layered)),
        ("calibration", "Calibration", coverage is not None or bool(told)),
        ("generations", "In their own words", bool(report.prompts)),
        ("how", "How this was measured", True),
    ]
    return _template().render(
        report=report,
        advice=advice(report),
        parts=[(id_, title) for id_, title, there in sections if there],
        ordered=by_size(report.files),
        drawn={name: by_name.get(name) for name in ("frontier", "tokens")},
        layered=layered,
        known=coverage is not None or bool(told),
        told=told,
        coverage=coverage,
        experts=[] if coverage is None else experts(coverage),
        silent=[] if coverage is None else sorted((s for s in coverage.seen if s.silent), key=lambda s: -s.silent),
        limits=LIMITS,
        most_faults=MOST_FAULTS,
        n_tokens=max((len(file.tokens.kl) for file in report.files if file.tokens is not None), default=0),
    )


def experts(coverage: Coverage) -> list[Experts]:
    """One line per layer: what its experts were given. Matrices of a layer that got the same are one line."""
    lines: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for each in coverage.seen:
        if len(each.tokens) > 1:
            block = each.name.rsplit(".", 2)[0]
            lines.setdefault((block, each.tokens), []).append(
                each.name.removesuffix(".weight").removeprefix(f"{block}.")
            )
    found = []
    for (block, tokens), names in lines.items():
        none = [str(k) for k, n in enumerate(tokens) if n == 0]
        more = f" and {len(none) - MOST_NUMBERS} more" if len(none) > MOST_NUMBERS else ""
        unseen = f"{len(none)} of them: {', '.join(none[:MOST_NUMBERS])}{more}" if none else ""
        median = statistics.median(tokens)
        found.append(Experts(f"{block}: {', '.join(names)}", len(tokens), min(tokens), median, max(tokens), unseen))
    return found


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    environment.filters |= {"size": size, "number": _number, "short": _short, "percent": _percent, "text": _text}
    source = files("whit.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "∞"


def _short(value: float) -> str:
    return f"{value:.1g}" if math.isfinite(value) else "∞"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else "∞"


def _text(text: str) -> str:
    """A text that a model wrote; what is no letter in HTML becomes a mark."""
    return "".join(each if each >= " " or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in text)
