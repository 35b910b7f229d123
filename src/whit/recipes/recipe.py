"""Which grid and which rounding for which tensor: a printable list of rules, the first match wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from whit.errors import RecipeError
from whit.grids.named import grid_named
from whit.rounding.named import check_rounding


@dataclass(frozen=True)
class Rule:
    """Tensors whose GGUF name matches `pattern` (shell wildcards) go on `grid` by `rounding`.

    Raises RecipeError for a grid or rounding that does not exist, or a rounding that is not for the grid.
    """

    pattern: str
    grid: str
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        check_rounding(self.rounding, grid_named(self.grid))

    def __str__(self) -> str:
        return f"{self.pattern} -> {self.grid} by {self.rounding}"


@dataclass(frozen=True)
class Recipe:
    """A named list of rules. A tied head answers to both of its names, token_embd.weight and output.weight.

    mixture      name of the mixture whose rules follow once the model is known, else empty
    rounding     of the tensors that the mixture chooses types for
    n_overrides  how many of the first rules somebody asked for by hand
    summary      what stands for the rules in print when there is one for every tensor, else empty
    layout       of the output: "gguf", or one of the folders of recipes/folders.py
    activations  how runtimes quantize what arrives at the layers, empty for not at all
    """

    name: str
    rules: tuple[Rule, ...]
    mixture: str = ""
    rounding: str = "nearest"
    n_overrides: int = 0
    summary: str = ""
    layout: str = "gguf"
    activations: str = ""

    def rule_for(self, names: Sequence[str]) -> Rule:
        """The first rule that matches any of a tensor's names. Raises RecipeError when none does."""
        for rule in self.rules:
            if any(fnmatchcase(name, rule.pattern) for name in names):
                return rule
        raise RecipeError(f"Recipe {self.name} has no rule for {names[0]}; add a last rule with the pattern *.")

    def __str__(self) -> str:
        if self.summary:
            return f"{self.name}: {self.summary}"
        rules = [*map(str, self.rules), *([f"mixture {self.mixture} by {self.rounding}"] if self.mixture else [])]
        return f"{self.name}: " + ", ".join(rules)
