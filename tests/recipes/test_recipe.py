import pytest

from whit.errors import RecipeError
from whit.recipes.named import RECIPES, recipe_named
from whit.recipes.recipe import Recipe, Rule


def test_the_first_rule_that_matches_wins() -> None:
    recipe = Recipe("mine", (Rule("blk.0.*", "q8_0"), Rule("*", "q4_0", "search")))
    assert recipe.rule_for(["blk.0.attn_q.weight"]).grid == "q8_0"
    assert recipe.rule_for(["blk.10.attn_q.weight"]) == Rule("*", "q4_0", "search")


def test_a_tied_head_answers_to_both_of_its_names() -> None:
    recipe = Recipe("mine", (Rule("output.weight", "q8_0"), Rule("*", "q4_0")))
    assert recipe.rule_for(["token_embd.weight", "output.weight"]).grid == "q8_0"
    assert recipe.rule_for(["token_embd.weight"]).grid == "q4_0"


def test_a_tensor_without_a_rule_is_named() -> None:
    with pytest.raises(RecipeError, match="no rule for output.weight"):
        Recipe("mine", (Rule("blk.*", "q8_0"),)).rule_for(["output.weight"])


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(RecipeError, match="no recipe called 'q4_k_x'. Known recipes: f32, f16, bf16, q8_0"):
        recipe_named("q4_k_x")


@pytest.mark.parametrize(("grid", "rounding"), [("q9_0", "nearest"), ("q4_0", "magic")])
def test_a_rule_names_a_grid_and_a_rounding_that_exist(grid: str, rounding: str) -> None:
    with pytest.raises(RecipeError, match="Known"):
        Rule("*", grid, rounding)


@pytest.mark.parametrize("name", RECIPES)
def test_names_are_found_in_any_case_and_printed(name: str) -> None:
    assert str(recipe_named(name.upper(), "search")).startswith(f"{name}: ")
