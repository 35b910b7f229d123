"""Recipes that come back as they were, and files that are something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from whit.errors import RecipeError
from whit.recipes.files import read_recipe, write_recipe
from whit.recipes.recipe import Recipe, Rule


def test_a_recipe_comes_back_as_it_was(tmp_path: Path) -> None:
    rules = (Rule("blk.*.ffn_down.weight", "q6_k", "feedback"), Rule("*", "f32"))
    recipe = Recipe("fit", rules, summary="for a test")
    write_recipe(recipe, tmp_path / "a.json")
    assert read_recipe(tmp_path / "a.json") == recipe
    assert str(recipe) == "fit: for a test"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "a recipe is an object"),
        ('{"name": "a", "summary": "", "rules": []}', "at least one rule"),
        ('{"name": "a", "summary": "", "rules": [{"pattern": "*"}]}', "a rule is an object"),
        ('{"name": 1, "summary": "", "rules": [{}]}', "`name` must be a text"),
        ('{"name": "a", "summary": "", "rules": [{"pattern": "*", "grid": "q9", "rounding": "nearest"}]}', "q9"),
        ('{"name": "a", "summary": "", "rules": [{"pattern": "*", "grid": "q8_0", "rounding": "no"}]}', "'no'"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RecipeError, match=said):
        read_recipe(tmp_path / "a.json")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "a.json")
