"""Quantizers by name, and the names that texts have for them."""

from __future__ import annotations

import pytest

from whit.errors import RecipeError
from whit.grids.named import grid_named
from whit.recipes.folders import WHIT, folder_recipe
from whit.recipes.named import RECIPES
from whit.recipes.quantizers import ALIASES, EXAMPLES, Quantizer, quantizer_named


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("share", ["", "-g64", "-tensor"])
def test_every_quantizer_has_its_bits_and_shares(bits: int, share: str) -> None:
    uniform = f"int{bits}{share}-asym"
    wanted = {
        "uniform": Quantizer(uniform, None),
        "kmeans": Quantizer(f"kmeans{bits}{share}", None),
        "kl": Quantizer(uniform, "kl"),
        "kl-output": Quantizer(uniform, "fisher"),
    }
    for name, quantizer in wanted.items():
        assert quantizer_named(f"{name}-{bits}bit{share}") == quantizer_named(f"{name}{bits}{share}") == quantizer
        grid_named(quantizer.grid)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_the_names_of_texts_are_taken(alias: str, name: str) -> None:
    assert quantizer_named(f"{alias.upper()}-4bit-g64") == quantizer_named(f"{name}-4bit-g64") is not None


@pytest.mark.parametrize("name", [*RECIPES, "kmeans", "kmeans-5bit", "kmeans-4bit-g0", "K_M", "uniform-4bit-row", "kl"])
def test_other_names_are_not_quantizers(name: str) -> None:
    """llama.cpp's q4_k_m above all: its M is a mixture."""
    assert quantizer_named(name) is None


@pytest.mark.parametrize("name", [*EXAMPLES, "K_L-3bit", "kmeans3-g64"])
def test_recipes_of_these_names_are_folders_of_whit(name: str) -> None:
    recipe = folder_recipe(name, "feedback")
    assert recipe is not None
    assert recipe.layout == WHIT
    rule = recipe.rule_for(["blk.0.ffn_up.weight"])
    quantizer = quantizer_named(name)
    assert quantizer is not None
    assert (rule.grid, rule.rounding) == (quantizer.grid, quantizer.rounding or "feedback")
    assert recipe.rule_for(["output.weight"]).grid == "f16"


def test_a_rounding_that_cuts_ranges_is_refused_for_levels() -> None:
    with pytest.raises(RecipeError, match="ranges of scales"):
        folder_recipe("kmeans-4bit", "kl")
