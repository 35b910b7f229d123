"""Which grid for which matrix: the least predicted damage in a number of bytes, counted to the last one.

Which grids there are and what they take is the target's business (targets.py), the choice that of recipes/budget.py.
Tensors that a runtime multiplies as one are one item: they get the same grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whit.errors import RecipeError
from whit.grids.floats import Float
from whit.grids.named import grid_named
from whit.models.model import Model
from whit.pipeline.keep import check_together, kept
from whit.pipeline.targets import GGUF, target_of
from whit.recipes.budget import Choice, NoSolutionError, Solution, smallest, solve
from whit.recipes.recipe import Recipe

Damages = Mapping[str, Mapping[str, float]]  # tensor -> grid -> nats per token
TRIES = 8  # at a header whose length depends on the choices


@dataclass(frozen=True)
class Allocation:
    """A recipe with a rule for every matrix.

    recipe   what a writer takes
    n_bytes  the exact size of the output
    damage   predicted KL divergence, nats per token
    bound    no choice among the same grids of at most this size is predicted to lose less than this
    """

    recipe: Recipe
    n_bytes: int
    damage: float
    bound: float


class Allocator:
    """Solves one model's allocations.

    model       as it was given
    candidates  tensor -> names of grids
    kept        tensor -> the only grid that it may be on
    n_weights   weights in the output
    least       bytes of the smallest output there is
    most        bytes of the largest
    """

    def __init__(
        self,
        model: Model,
        rounding: str = "feedback",
        grids: Sequence[str] | None = None,
        layout: str = GGUF,
        keep: Sequence[str] = (),
    ) -> None:
        """From headers alone.

        grids   the only ones to choose from; a matrix that none of them fits keeps all of its own
        layout  of the output: "gguf", or one of the folders of recipes/folders.py
        keep    settings such as `lm_head=f16` (keep.py): the budget is spent on the other tensors
        Raises RecipeError for settings that cannot be met.
        """
        self.model, self._target = model, target_of(model, layout, rounding, grids)
        self.candidates = {
            name: tuple(grid for grid in names if not grids or grid in grids) or names
            for name, names in self._target.candidates.items()
        }
        asked = kept(model, keep, layout) if keep else {}
        # A folder's embeddings and head are floats unless something else is asked for.
        self.kept = {
            name: grid
            for name, grid in asked.items()
            if name in self.candidates or not isinstance(grid_named(grid), Float)
        }
        self.candidates |= {name: (grid,) for name, grid in self.kept.items()}
        self.n_weights = self._target.n_weights
        together = {name: group for group in self._target.groups for name in group}
        if self._target.groups:
            check_together({name: self.kept.get(name, "") for name in self.candidates}, self.kept)
        self._items = list(dict.fromkeys(together.get(name, (name,)) for name in self.candidates))
        self._choices = [self._common(item) for item in self._items]
        sizes = [[self._bytes(item, grid) for grid in grids_] for item, grids_ in self._pairs()]
        some = [min(zip(each, grids_, strict=True)) for each, (_, grids_) in zip(sizes, self._pairs(), strict=True)]
        large = [max(zip(each, grids_, strict=True)) for each, (_, grids_) in zip(sizes, self._pairs(), strict=True)]
        self.least, self.most = (self._target.size(self._spread([grid for _, grid in each])) for each in (some, large))
        self._others = self.least - sum(n for n, _ in some)

    def check(self, n_bytes: int) -> None:
        """Raise RecipeError, saying what is possible, when nothing has at most `n_bytes`."""
        if n_bytes < self.least:
            raise RecipeError(
                f"Nothing fits in {n_bytes:,} bytes: the smallest file of this model has {self.least:,} "
                f"({8 * self.least / self.n_weights:.2f} bits per weight).{self._target.why_not_less()} "
                "Give more room or take a smaller model."
            )

    def fit(self, damages: Damages, n_bytes: int) -> Allocation:
        """What is predicted to lose least in at most `n_bytes`. Raises RecipeError as `check` does."""
        self.check(n_bytes)
        if n_bytes == self.least:  # headers of other choices may be shorter or longer
            return self._allocation(solve(self._damaged(damages), n_bytes - self._others))
        room = n_bytes
        for _ in range(TRIES):
            found = self._allocation(solve(self._damaged(damages), max(room, self.least) - self._others))
            if found.n_bytes <= n_bytes:
                break
            room -= found.n_bytes - n_bytes
        return found

    def promise(self, damages: Damages, most: float) -> Allocation:
        """The smallest output that is predicted to lose at most `most` nats per token.

        Raises RecipeError with the least that is possible.
        """
        try:
            found = smallest(self._damaged(damages), most)
        except NoSolutionError as error:
            raise RecipeError(
                f"No file keeps KL below {most:g}: the least that is predicted is {error.least:.3g}."
            ) from None
        return self._allocation(found)

    def grids(self, allocation: Allocation) -> dict[str, str]:
        """The grid of every matrix."""
        return {rule.pattern: rule.grid for rule in allocation.recipe.rules if rule.pattern in self.candidates}

    def weights_in(self, name: str) -> int:
        """Weights of a matrix."""
        return self._target.weights_in(name)

    def _common(self, item: tuple[str, ...]) -> tuple[str, ...]:
        """The grids that all tensors of an item may be on."""
        return tuple(grid for grid in self.candidates[item[0]] if all(grid in self.candidates[each] for each in item))

    def _pairs(self) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        return list(zip(self._items, self._choices, strict=True))

    def _bytes(self, item: tuple[str, ...], grid: str) -> int:
        return sum(self._target.stored(name, grid) for name in item)

    def _damaged(self, damages: Damages) -> list[list[Choice]]:
        return [
            [Choice(grid, self._bytes(item, grid), sum(damages[name][grid] for name in item)) for grid in grids]
            for item, grids in self._pairs()
        ]

    def _spread(self, chosen: Sequence[str]) -> dict[str, str]:
        """The grid of every tensor, in the order of the file, of grids of items."""
        found = {name: grid for item, grid in zip(self._items, chosen, strict=True) for name in item}
        return {name: found[name] for name in self.candidates}

    def _allocation(self, found: Solution) -> Allocation:
        chosen = self._spread([grids[c] for (_, grids), c in zip(self._pairs(), found.chosen, strict=True)])
        return Allocation(self._target.recipe(chosen), self._target.size(chosen), found.damage, found.bound)
