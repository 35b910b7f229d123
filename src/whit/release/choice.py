"""Which variant for whom: the ones to recommend, what each is for, and the one for a given memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whit.errors import RecipeError
from whit.evaluation.verdict import EXCELLENT, GOOD
from whit.release.record import Record

USES = {
    EXCELLENT: "next to no loss, where memory allows it",
    GOOD: "everyday use, a small loss",
    "usable": "when memory is short, a loss that shows",
}


@dataclass(frozen=True)
class Choice:
    """What is said of a variant.

    recommended  whether it is one of the few to look at first
    use          a few words
    """

    recommended: bool
    use: str


def choices(records: Sequence[Record]) -> dict[str, Choice]:
    """By name of the file. Two of each kind (GGUF, for GPUs) are recommended at most: the smallest whose verdict is
    excellent, the smallest that is good or better; where there is none, the one that lost least.

    What another of its kind beats in both size and divergence is recommended to nobody.
    """
    found: dict[str, Choice] = {}
    for kind in (True, False):
        mine = sorted((each for each in records if each.is_gguf == kind), key=lambda each: each.n_bytes)
        taken = {each.file: _better(each, mine) for each in mine}
        free = [each for each in mine if taken[each.file] is None]
        firsts = [
            next((each for each in free if each.word in words), None) for words in ((EXCELLENT,), (EXCELLENT, GOOD))
        ]
        best = {each.file for each in firsts if each is not None} or {each.file for each in free[-1:]}
        for each in mine:
            other = taken[each.file]
            use = USES.get(each.word, "") if other is None else f"rather take {other.file}: smaller and nearer"
            found[each.file] = Choice(each.file in best, use)
    return found


def pick(records: Sequence[Record], n_bytes: int) -> list[Record]:
    """What runs in so many bytes and loses least: one for llama.cpp, one for GPUs, where there are any.

    Raises RecipeError that names the smallest when none runs.
    """
    fitting = [each for each in records if each.ram <= n_bytes]
    if not fitting:
        least = min(records, key=lambda each: each.ram)
        raise RecipeError(
            f"Nothing here runs in {n_bytes / 1e9:.3g} GB: the smallest, {least.file}, needs {least.ram / 1e9:.3g} GB "
            f"with {least.context} tokens of context."
        )
    kinds = [[each for each in fitting if each.is_gguf == kind] for kind in (True, False)]
    return [min(each, key=lambda record: (record.result.kl_mean, record.n_bytes)) for each in kinds if each]


def _better(record: Record, others: Sequence[Record]) -> Record | None:
    """The nearest to the original of those that are smaller and nearer, None when there is none."""
    found = [each for each in others if each.n_bytes < record.n_bytes and each.result.kl_mean < record.result.kl_mean]
    return min(found, key=lambda each: each.result.kl_mean, default=None)
