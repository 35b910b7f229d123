"""Which grid for which matrix: the least predicted damage in a number of bytes, counted to the last one.

The bytes of a file are its header, padded to 32, and every tensor, padded to 32. The header does not depend on the
choices (types are numbers of fixed width, and the recipe is recorded by a summary), so the sizes of matrices add up
to the exact size of the file, and recipes/budget.py solves the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whit.checkpoints.gguf import Announced
from whit.errors import RecipeError
from whit.grids.named import GRIDS
from whit.layouts.ggml import GGMLType, ggml_type_of
from whit.models.architecture import GGUFTensor, GGUFView
from whit.models.model import Model
from whit.pipeline.quantize import model_view, predicted_bytes
from whit.recipes.budget import Choice, NoSolutionError, Solution, smallest, solve
from whit.recipes.recipe import Recipe, Rule

# llama.cpp runs all of these. Where rows divide into superblocks, their grids lose less at equal bytes than blocks.
SUPERBLOCKS = (
    *("iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k"),
    *("iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0", "f16"),
)
BLOCKS = ("mxfp4", "iq4_nl", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16")
SUMMARY = "a grid of its own for every matrix"
Damages = Mapping[str, Mapping[str, float]]  # tensor -> grid -> nats per token


@dataclass(frozen=True)
class Allocation:
    """A recipe with a rule for every matrix.

    recipe   what `write_gguf` takes
    n_bytes  the exact size of the file
    damage   predicted KL divergence, nats per token
    bound    no choice among the same grids of at most this size is predicted to lose less than this
    """

    recipe: Recipe
    n_bytes: int
    damage: float
    bound: float


def candidates(view: GGUFView) -> dict[str, tuple[str, ...]]:
    """For every matrix of a file the grids that it may be stored on, by the length of its rows."""
    return {tensor.name: _grids(tensor) for tensor in view.tensors if not tensor.keep_float}


class Allocator:
    """Solves one model's allocations.

    model      as it was given
    n_weights  weights in the file
    least      bytes of the smallest file there is
    most       bytes of the largest
    """

    def __init__(self, model: Model, rounding: str = "feedback", grids: Sequence[str] | None = None) -> None:
        """From headers alone.

        grids  the only ones to choose from; a matrix that none of them fits keeps all of its own
        """
        self.model, self._rounding = model, rounding
        view = model_view(model)
        self._tensors = {tensor.name: tensor for tensor in view.tensors if not tensor.keep_float}
        self.candidates = {
            name: tuple(grid for grid in names if not grids or grid in grids) or names
            for name, names in candidates(view).items()
        }
        self.n_weights = sum(tensor.n_weights for tensor in view.tensors)
        sizes = {name: [self._stored(name, grid) for grid in names] for name, names in self.candidates.items()}
        some = {name: names[0] for name, names in self.candidates.items()}
        matrices = sum(each[0] for each in sizes.values())
        self._others = predicted_bytes(model, self._recipe(some)) - matrices
        self.least = self._others + sum(map(min, sizes.values()))
        self.most = self._others + sum(map(max, sizes.values()))

    def check(self, n_bytes: int) -> None:
        """Raise RecipeError, saying what is possible, when no file has at most `n_bytes`."""
        if n_bytes < self.least:
            narrow = [name for name, grids in self.candidates.items() if "iq2_xxs" not in grids]
            why = ""
            if narrow:
                t = self._tensors[narrow[0]]
                why = (
                    f" {len(narrow)} of {len(self.candidates)} matrices, such as {t.name}, have rows of {t.shape[-1]} "
                    "weights, which do not divide into the superblocks of 256 that grids below 4 bits need."
                )
            raise RecipeError(
                f"Nothing fits in {n_bytes:,} bytes: the smallest file of this model has {self.least:,} "
                f"({8 * self.least / self.n_weights:.2f} bits per weight).{why} Give more room or take a smaller model."
            )

    def fit(self, damages: Damages, n_bytes: int) -> Allocation:
        """The file that is predicted to lose least in at most `n_bytes`. Raises RecipeError as `check` does."""
        self.check(n_bytes)
        return self._allocation(solve(self._items(damages), n_bytes - self._others))

    def promise(self, damages: Damages, most: float) -> Allocation:
        """The smallest file that is predicted to lose at most `most` nats per token.

        Raises RecipeError with the least that is possible.
        """
        try:
            found = smallest(self._items(damages), most)
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
        return self._tensors[name].n_weights

    def _items(self, damages: Damages) -> list[list[Choice]]:
        return [
            [Choice(grid, self._stored(name, grid), damages[name][grid]) for grid in grids]
            for name, grids in self.candidates.items()
        ]

    def _allocation(self, found: Solution) -> Allocation:
        pairs = zip(self.candidates.items(), found.chosen, strict=True)
        recipe = self._recipe({name: grids[c] for (name, grids), c in pairs})
        return Allocation(recipe, self._others + found.n_bytes, found.damage, found.bound)

    def _recipe(self, chosen: Mapping[str, str]) -> Recipe:
        rules = [Rule(name, grid, self._rounding) for name, grid in chosen.items()]
        return Recipe("fit", (*rules, Rule("*", "f32")), summary=SUMMARY)

    def _stored(self, name: str, grid: str) -> int:
        return Announced(name, self._tensors[name].shape, _type(grid).name).n_stored


def _grids(tensor: GGUFTensor) -> tuple[str, ...]:
    for names in (SUPERBLOCKS, BLOCKS):
        if not tensor.shape[-1] % _type(names[0]).block:
            return names
    return ("f16",)


def _type(grid: str) -> GGMLType:
    kind = ggml_type_of(GRIDS[grid])
    assert kind is not None  # all of the names above have one
    return kind
