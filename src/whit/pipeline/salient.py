"""A share of a model's weights at the next better type: those matrices that lose most per byte.

Whole matrices, because no runtime loads single channels of one at another precision. What a matrix loses on its type
and on the better one is predicted (sensitivity.py), what it takes is known from headers; the rest is sorting. The
solver of allocate.py does better for a given size, because it also takes bits away; this is for a recipe that must
stay as it is everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from whit.errors import RecipeError
from whit.grids.floats import Float
from whit.grids.named import grid_named
from whit.grids.scaled import PerChannel, PerGroup, Scaled
from whit.layouts.ggml import ggml_type_of
from whit.models.model import Model
from whit.pipeline.folder import plan_model
from whit.pipeline.folder_plan import matrix_shape
from whit.pipeline.formats import FOLDERS
from whit.pipeline.keep import TOGETHER, matrix_names, with_kept
from whit.pipeline.plan import Plan, Step
from whit.pipeline.targets import GGUF, fused
from whit.recipes.recipe import Recipe

EIGHT = 8  # bits; from there on the next better type is the 16-bit float
SIZES = (128, 64, 32)  # groups of 8-bit integers that runtimes have
FLOAT = "f16"


@dataclass(frozen=True)
class Raised:
    """Matrices that go from one type to the next better one, together where a runtime multiplies them as one.

    names          GGUF tensors
    before, after  names of grids
    n_weights      of all of them
    n_bytes        that this adds to the output
    lost, left     nats per token before and after, predicted
    """

    names: tuple[str, ...]
    before: str
    after: str
    n_weights: int
    n_bytes: int
    lost: float = 0.0
    left: float = 0.0

    @property
    def worth(self) -> float:
        """Nats per token that every added byte saves."""
        return (self.lost - self.left) / max(1, self.n_bytes)


class Salient:
    """What may be raised in the output of one recipe.

    candidates  tensor -> (grid now, next better grid), for `sensitivities`
    plain       whether these are for plain rounding
    """

    def __init__(self, model: Model, recipe: Recipe, held: Mapping[str, str], rounding: str, share: float) -> None:
        """From headers alone.

        held      tensors that are kept on a type by hand: they stay there
        rounding  of what is raised
        share     of all weights, 0 < share < 1
        Raises RecipeError when no matrix can be raised, or none is so small.
        """
        self._model, self._recipe, self._held, self._rounding = model, recipe, dict(held), rounding
        self._names, self.plain = matrix_names(model), rounding == "nearest"
        plan, _ = plan_model(model, recipe)
        self._most = share * plan.n_weights
        better = {step.tensor.name: _better(step, recipe) for step in plan.steps if step.tensor.name in self._names}
        wanted = {name: grid for name, grid in better.items() if grid and name not in held}
        raised, _ = plan_model(model, with_kept(recipe, wanted, self._names, rounding))
        self._items = _items(plan, raised, wanted)
        if not self._items:
            raise RecipeError(f"--salient: recipe {recipe.name} has no matrix here that could go to a better type.")
        smallest = min(self._items, key=lambda each: each.n_weights)
        if smallest.n_weights > self._most:
            raise RecipeError(
                f"--salient: the smallest that can be raised, {' with '.join(smallest.names)}, has "
                f"{100 * smallest.n_weights / plan.n_weights:.2g} % of the weights. Give a larger share."
            )
        self.candidates = {name: (each.before, each.after) for each in self._items for name in each.names}

    def chosen(self, damages: Mapping[str, Mapping[str, float]]) -> tuple[Raised, ...]:
        """What is raised: by worth, as long as it fits into the share; the most worthy first.

        damages  tensor -> grid -> nats per token, for all candidates
        """
        counted = [
            Raised(
                *(each.names, each.before, each.after, each.n_weights, each.n_bytes),
                lost=sum(damages[name][each.before] for name in each.names),
                left=sum(damages[name][each.after] for name in each.names),
            )
            for each in self._items
        ]
        found, room = [], self._most
        for each in sorted(counted, key=lambda each: -each.worth):
            if each.worth > 0 and each.n_weights <= room:
                found.append(each)
                room -= each.n_weights
        return tuple(found)

    def recipe(self, chosen: tuple[Raised, ...]) -> Recipe:
        """The recipe with what is raised in front."""
        return with_kept(
            self._recipe, {name: each.after for each in chosen for name in each.names}, self._names, self._rounding
        )


def parse_share(text: str) -> float:
    """A share of weights that a person typed: 1%, 0.5 %, 0.01. Raises RecipeError for anything else."""
    number, percent = text.strip().removesuffix("%").strip(), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise RecipeError(f"--salient {text!r} is not a share of the weights. Write it like 1% or 0.01.")
    return share


def _better(step: Step, recipe: Recipe) -> str:
    """The name of the next better grid: 8 bits, then the 16-bit float; empty for floats."""
    if isinstance(step.grid, Float):
        return ""
    shape = matrix_shape(step.tensor)
    if recipe.activations or step.grid.bits_per_weight(shape[1]) >= EIGHT:
        return FLOAT
    if recipe.layout == GGUF:
        return FLOAT if shape[1] % 32 else "q8_0"
    for name in _eights(step):
        grid = grid_named(name)
        if FOLDERS[recipe.layout].layout(grid).refuses(grid, shape) is None:
            return name
    return FLOAT


def _eights(step: Step) -> list[str]:
    """8-bit integers, those with the groups that the matrix has first, then larger groups before smaller ones."""
    names = [f"int8-g{size}" for size in SIZES]
    scheme = step.grid.scheme if isinstance(step.grid, Scaled) else None
    if isinstance(scheme, PerGroup) and scheme.size in SIZES:
        return [f"int8-g{scheme.size}", *names]
    return ["int8", *names] if isinstance(scheme, PerChannel) else [*names, "int8"]


def _items(plan: Plan, raised: Plan, wanted: Mapping[str, str]) -> list[Raised]:
    """Every matrix that really gets the grid that is wanted for it, with those that must go with it."""
    pairs = {
        before.tensor.name: (before, after)
        for before, after in zip(plan.steps, raised.steps, strict=True)
        if before.tensor.name in wanted and not after.exception
    }
    names = [step.tensor.name for step in plan.steps]
    groups = {name: group for group in fused(names) for name in group} if plan.recipe.layout in TOGETHER else {}
    found = []
    for group in dict.fromkeys(groups.get(name, (name,)) for name in pairs):
        if any(name not in pairs for name in group) or len({wanted[name] for name in group}) > 1:
            continue
        steps = [pairs[name] for name in group]
        added = sum(after.n_bytes - before.n_bytes for before, after in steps)
        n_weights = sum(before.tensor.n_weights for before, _ in steps)
        found.append(Raised(group, _plain(steps[0][0]), wanted[group[0]], n_weights, added))
    return found


def _plain(step: Step) -> str:
    """The grid's name without the dtype of its scales, which makes no difference worth a sweep."""
    kind = ggml_type_of(step.grid)
    return kind.name.lower() if kind and step.type == kind.name else step.type.partition(":")[0]
