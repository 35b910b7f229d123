"""Recipes with a name: the float types, and llama.cpp's mixtures, which are spelled out once the model is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from whit.errors import RecipeError
from whit.recipes.mixtures import BASE, Facts, mixture
from whit.recipes.recipe import Recipe, Rule

FLOATS = ("f32", "f16", "bf16")
RECIPES = (*FLOATS, *BASE)


def recipe_named(name: str, rounding: str = "nearest", pure: bool = False) -> Recipe:
    """The recipe called `name` (case does not matter) with one rounding for all of its tensors.

    pure  every tensor on the recipe's main type, the head too
    Raises RecipeError that lists the names there are.
    """
    key = name.lower()
    if key not in RECIPES:
        raise RecipeError(f"There is no recipe called {name!r}. Known recipes: {', '.join(RECIPES)}.")
    if pure or key in FLOATS:
        return Recipe(key, (Rule("*", BASE.get(key, key), rounding),))
    return Recipe(key, (), mixture=key, rounding=rounding)


def resolved(recipe: Recipe, tensors: Sequence[tuple[str, tuple[int, ...]]], model: Facts) -> Recipe:
    """The recipe with its mixture spelled out for one model: a rule per exception, then one for the rest.

    tensors  GGUF names and shapes
    Raises RecipeError when an override matches none of them.
    """
    for rule in recipe.rules[: recipe.n_overrides]:
        if not any(fnmatchcase(name, rule.pattern) for name, _ in tensors):
            raise RecipeError(f"The pattern {rule.pattern} matches no tensor; `whit inspect` lists their names.")
    if not recipe.mixture:
        return recipe
    kinds = mixture(recipe.mixture, tensors, model)
    counts = Counter(kinds.values())
    common = counts.most_common(1)[0][0] if counts else BASE[recipe.mixture]
    rules = [Rule(tensor, kind, recipe.rounding) for tensor, kind in kinds.items() if kind != common]
    return replace(recipe, rules=(*recipe.rules, *rules, Rule("*", common, recipe.rounding)), mixture="")
