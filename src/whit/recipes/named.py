"""Recipes with a name. Here the uniform ones; mixtures are lists of the same rules.

Below 8 bits the head stays at 8: it is one matrix of many rows whose errors reach every logit directly, and
llama.cpp's file types of the same names treat it alike.
"""

from __future__ import annotations

from whit.errors import RecipeError
from whit.recipes.recipe import Recipe, Rule

HEAD = "output.weight"
HEAD_GRID = "q8_0"
UNIFORM = ("f32", "f16", "bf16", "q8_0")
WITH_FINER_HEAD = ("q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
RECIPES = UNIFORM + WITH_FINER_HEAD


def recipe_named(name: str, rounding: str = "nearest") -> Recipe:
    """The recipe called `name` (case does not matter) with one rounding for all of its tensors.

    Raises RecipeError that lists the names there are.
    """
    key = name.lower()
    if key in UNIFORM:
        return Recipe(key, (Rule("*", key, rounding),))
    if key in WITH_FINER_HEAD:
        return Recipe(key, (Rule(HEAD, HEAD_GRID, rounding), Rule("*", key, rounding)))
    raise RecipeError(f"There is no recipe called {name!r}. Known recipes: {', '.join(RECIPES)}.")
