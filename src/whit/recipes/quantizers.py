"""Quantizers by the names of textbooks: a set of values and a way to choose among them, in one word.

    uniform-<bits>bit    equal buckets between the smallest and the largest weight; rounded as is asked for
    kmeans-<bits>bit     levels learned from the weights (k-means, exactly); rounded as is asked for
    kl-<bits>bit         equal buckets in a range that is cut so that the weights' distribution changes least
    kl-output-<bits>bit  equal buckets in the range that changes the model's predictions least, by Fisher information

with 2, 3, 4 or 8 bits, per output channel, or `-g<n>` for groups of n weights and `-tensor` for one table or scale for
the matrix; `+0.5%` after k-means for as many weights in half precision beside the codes. `kmeans4-g64` is
`kmeans-4bit-g64`. Some texts call the first three K_S, K_M and K_L, and these names are taken, too. They have nothing
to do with the S, M and L of llama.cpp (q4_k_m), which are mixtures of block types.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from whit.rounding.methods import BY_FISHER
from whit.rounding.named import KL

UNIFORM, KMEANS, KL_OUTPUT = "uniform", "kmeans", "kl-output"
ALIASES = {"k_s": UNIFORM, "k_m": KMEANS, "k_l": KL}
ROUNDINGS = {KL: KL, KL_OUTPUT: BY_FISHER}  # of quantizers that leave no choice
EXAMPLES = tuple(f"{name}-4bit" for name in (UNIFORM, KMEANS, KL, KL_OUTPUT))
_NAME = re.compile(
    r"(uniform|kmeans|kl|kl-output|k_s|k_m|k_l)(?:([2348])|-([2348])bit)(-g[1-9]\d*|-tensor|)(\+[\d.]+%|)"
)


@dataclass(frozen=True)
class Quantizer:
    """What a name means.

    grid      its name
    rounding  the only one there is for it, None where any goes
    """

    grid: str
    rounding: str | None


def quantizer_named(name: str) -> Quantizer | None:
    """The quantizer called `name` (case does not matter), None when it is not one of these."""
    found = _NAME.fullmatch(name.lower())
    if found is None:
        return None
    kind, bits, share = ALIASES.get(found[1], found[1]), found[2] or found[3], found[4]
    if found[5] and kind != KMEANS:
        return None
    grid = f"kmeans{bits}{share}{found[5]}" if kind == KMEANS else f"int{bits}{share}-asym"
    return Quantizer(grid, ROUNDINGS.get(kind))
