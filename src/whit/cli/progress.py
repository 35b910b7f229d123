"""One progress bar for all commands: what is being done, how far it is, how long it will take.

It is drawn on stderr and only on a terminal, so that pipes, log files and `--json` stay clean.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Report = Callable[[int, int, str], None]  # units done, units in all, what is being worked on


@contextmanager
def progress_bar(what: str) -> Iterator[Report]:
    """A bar for one run of work, removed when the run ends; the value is the function to report with.

    what  the work as a whole, such as "quantizing"
    The units are the caller's; only their ratio is shown.
    """
    if not sys.stderr.isatty():
        yield _ignore
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[part]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, part="")

        def report(done: int, total: int, part: str) -> None:
            bar.update(task, completed=done, total=total, part=part)

        yield report


def _ignore(done: int, total: int, part: str) -> None:
    """Nobody is watching."""
