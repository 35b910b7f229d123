"""The time of a job: amounts of work (pipeline/counts.py), each times what it takes here (pipeline/speed.py).

How an amount's time grows with its rows and columns is a law; a law is found from one to three points that were timed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

# What is timed. Rows and columns of an amount mean what stands behind it.
PASS = "pass"  # a window of tokens through a block: rows weights, cols tokens
SLOW_PASS = "slow pass"  # the same in full precision, as the verdict makes it
MOMENT = "moment"  # rows tokens of cols inputs put into a sum
FACTOR = "factor"  # second moments of cols inputs factored, on all cores
LONE_FACTOR = "lone factor"  # the same on one core, while the others do the same
READ = "read"  # rows weights
WRITE = "write"  # rows bytes, with a checksum, synced
DOCUMENTATION, TOKENS = "documentation", "tokens"  # the text that ships with Python; rows characters of it
PREDICT = "predict"  # logits of two models at rows positions, compared
STEP = "step"  # one token of rows texts that the model writes, through cols blocks
START = "start"  # the program itself
SAMPLE = "sample"  # a method: error feedback as rescaling tries it out
# of a type, (PACK, type): rows weights made bytes; made values again; read back by the other decoder
PACK, DECODE, CHECK = "pack", "decode", "check"


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and seconds of processors."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.wall * times, self.cpu * times)


NOTHING = Cost(0.0, 0.0)
Law = Callable[[float, float], Cost]  # of rows and columns
Laws = Mapping[Hashable, Law]


@dataclass(frozen=True)
class Amount:
    """Work of one kind, `times` over.

    what  it is for, as a report calls it
    kind  of those above; (method, grid) for rows that a rounding takes at a time
    """

    what: str
    kind: Hashable
    rows: float = 1
    cols: float = 1
    times: float = 1

    def cost(self, laws: Laws) -> Cost:
        """By the law of its kind."""
        return laws[self.kind](self.rows, self.cols) * self.times


Item = tuple[Amount, ...]  # what one core does in one piece


@dataclass(frozen=True)
class Work:
    """All that a job does.

    alone   one after the other
    spread  items that are shared out over the cores, batch after batch
    """

    alone: tuple[Amount, ...]
    spread: tuple[tuple[Item, ...], ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(self.alone + other.alone, self.spread + other.spread)

    def kinds(self) -> dict[Hashable, float]:
        """Every kind there is, with the most columns that it is wanted for."""
        found: dict[Hashable, float] = {}
        for each in self._amounts():
            found[each.kind] = max(found.get(each.kind, 0), each.cols)
        return found

    def count(self, kind: Hashable) -> float:
        """How often something of a kind is done."""
        return sum(each.times for each in self._amounts() if each.kind == kind)

    def rows(self, kind: Hashable) -> float:
        """Rows of a kind in all."""
        return sum(each.rows * each.times for each in self._amounts() if each.kind == kind)

    def cost(self, laws: Laws, cores: int) -> dict[str, Cost]:
        """By what it is for, the longest first. A batch ends no earlier than its dearest item."""
        found: dict[str, Cost] = defaultdict(lambda: NOTHING)
        for each in self.alone:
            found[each.what] += each.cost(laws)
        for batch in self.spread:
            costs = [sum((each.cost(laws) for each in item), NOTHING) for item in batch]
            together = sum(costs, NOTHING)
            wall = max(together.wall / cores, *(each.wall for each in costs))
            found[batch[0][0].what] += Cost(wall, together.cpu)
        return dict(sorted(found.items(), key=lambda each: -each[1].wall))

    def _amounts(self) -> list[Amount]:
        return [*self.alone, *(each for batch in self.spread for item in batch for each in item)]


# ---- what is said ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """How long a job takes.

    by       what for -> time, the longest first
    threads  that torch uses
    why      why nothing is known, else empty
    """

    by: Mapping[str, Cost]
    threads: int
    why: str = ""

    @property
    def total(self) -> Cost:
        """Of everything."""
        return sum(self.by.values(), NOTHING)

    def lines(self) -> list[str]:
        """For a person."""
        if self.why:
            return [f"  time: not known: {self.why}"]
        total, threads = self.total, f"{self.threads} thread{'s' * (self.threads > 1)}"
        lines = [
            f"  time: about {duration(total.wall)} on this machine, as busy as it is now ({threads}; "
            f"{duration(total.cpu)} of processors)"
        ]
        shares = [f"{100 * each.wall / total.wall:.0f} % {what}" for what, each in self.by.items()]
        lines.append(f"    of it {', '.join(each for each in shares if not each.startswith('0 '))}")
        if "verdict" in self.by:
            lines.append(f"    --no-verify saves {duration(self.by['verdict'].wall)}")
        return lines

    def flat(self) -> dict[str, object]:
        """For a machine."""
        if self.why:
            return {"seconds": None, "seconds_unknown": self.why}
        parts = {what: {"seconds": each.wall, "cpu_seconds": each.cpu} for what, each in self.by.items()}
        return {"seconds": self.total.wall, "cpu_seconds": self.total.cpu, "threads": self.threads, "parts": parts}


def duration(seconds: float) -> str:
    """Two digits and a unit, such as `4.2 min`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


# ---- laws ------------------------------------------------------------------------------------------------------


def powers(cost: Cost, rows: float, cols: float, of_rows: float = 0, of_cols: float = 0) -> Law:
    """The law of which one point is known: proportional to powers of rows and columns."""
    return lambda r, c: cost * ((r / rows) ** of_rows * (c / cols) ** of_cols)


def rounding_law(
    low: tuple[float, float, Cost], high: tuple[float, float, Cost], narrow: tuple[float, float, Cost]
) -> Law:
    """a cols + b rows cols + c rows cols^2: calls on single columns, work on weights, products with other columns.

    low, high  rows, columns and what they cost: few and many rows, equally many columns
    narrow     many rows of fewer columns; as `high` where the grid has none
    """
    wall = _fitted(*((r, c, cost.wall) for r, c, cost in (low, high, narrow)))
    cpu = _fitted(*((r, c, cost.cpu) for r, c, cost in (low, high, narrow)))

    def law(rows: float, cols: float) -> Cost:
        terms = cols, rows * cols, rows * cols**2
        return Cost(*(sum(x * y for x, y in zip(each, terms, strict=True)) for each in (wall, cpu)))

    return law


def _fitted(
    low: tuple[float, float, float], high: tuple[float, float, float], narrow: tuple[float, float, float]
) -> tuple[float, float, float]:
    (r0, cols, t0), (r1, _, t1), (r2, fewer, t2) = low, high, narrow
    slope = max(0.0, (t1 - t0) / (r1 - r0))  # seconds per row
    a = max(0.0, t1 - r1 * slope) / cols
    slope = (t1 - a * cols) / r1
    if fewer == cols:
        return a, slope / cols, 0.0
    other = max(0.0, t2 - a * fewer) / r2
    c = max(0.0, (slope / cols - other / fewer) / (cols - fewer))
    b = max(0.0, slope / cols - c * cols)
    return a, b, (slope / cols - b) / cols
