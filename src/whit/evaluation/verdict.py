"""One word for a file: excellent, good, usable, damaged or broken.

The word is that of the mean KL divergence from the original, the one figure that hides nothing, on limits that are
the same for all models. A fault, that is something that is not as the format says or as the original has it, makes a
file damaged however little it costs on the text that was read: nobody knows what it costs on another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from whit.evaluation.divergence import Comparison

EXCELLENT, GOOD, USABLE, DAMAGED, BROKEN = WORDS = ("excellent", "good", "usable", "damaged", "broken")
LIMITS = {EXCELLENT: 0.01, GOOD: 0.1, USABLE: 0.5, DAMAGED: 2.0}  # largest mean divergence, nats per token
FAILED = (DAMAGED, BROKEN)


@dataclass(frozen=True)
class Verdict:
    """The word, and why.

    near  the other word that the figure's error (two standard errors) leaves open, else empty
    why   one clause
    """

    word: str
    near: str
    why: str

    @property
    def passed(self) -> bool:
        """Whether the file is of use."""
        return self.word not in FAILED


def verdict(result: Comparison | None, faults: Sequence[str], unreadable: str = "") -> Verdict:
    """The verdict on a file.

    result      its comparison with the original, None when there is none
    faults      what is wrong with it, one clause each
    unreadable  why it cannot be read or run at all
    """
    if unreadable:
        return Verdict(BROKEN, "", unreadable)
    if result is None:
        return Verdict(DAMAGED, "", faults[0]) if faults else Verdict(USABLE, "", "its predictions were not measured")
    mean, error = result.kl_mean, 2 * result.kl_mean_se
    if not math.isfinite(mean):
        return Verdict(BROKEN, "", "its predictions rule out what the original expects")
    word = word_of(mean)
    near = next((other for other in (word_of(mean + error), word_of(mean - error)) if other != word), "")
    why = f"mean KL divergence {mean:.3g} nats"
    if faults and word not in FAILED:
        return Verdict(DAMAGED, "", f"{faults[0]} ({why}, which alone would be {word})")
    return Verdict(word, near, f"{why}; {faults[0]}" if faults else why)


def word_of(kl_mean: float) -> str:
    """The word for a mean divergence in nats per token."""
    return next((word for word, limit in LIMITS.items() if kl_mean <= limit), BROKEN)
