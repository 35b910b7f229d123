"""Recipes as JSON files, to be kept, edited and used again:

{
  "name": "fit",
  "summary": "at most 95000000 bytes",
  "rules": [{"pattern": "token_embd.weight", "grid": "q5_0", "rounding": "feedback"}, ...]
}

The first rule that matches a tensor counts; patterns take shell wildcards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from whit.checkpoints.atomic import whole_file
from whit.errors import RecipeError
from whit.recipes.folders import ACTIVATIONS, LAYOUTS
from whit.recipes.recipe import Recipe, Rule

KEYS = {"name", "summary", "rules"}
FOLDER_KEYS = {"layout", "activations"}  # of recipes for GPUs, beside the others
RULE_KEYS = {"pattern", "grid", "rounding"}


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe whose mixture, if it had one, is spelled out. Raises OutputError when it cannot be written."""
    rules = [{"pattern": rule.pattern, "grid": rule.grid, "rounding": rule.rounding} for rule in recipe.rules]
    lines = ",\n".join(f"    {json.dumps(rule)}" for rule in rules)
    head = f'{{\n  "name": {json.dumps(recipe.name)},\n  "summary": {json.dumps(recipe.summary)},\n'
    if recipe.layout != "gguf":
        head += f'  "layout": {json.dumps(recipe.layout)},\n  "activations": {json.dumps(recipe.activations)},\n'
    raw = f'{head}  "rules": [\n{lines}\n  ]\n}}\n'.encode()
    with whole_file(path, len(raw), overwrite=True) as file:
        file.write(raw)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a JSON file. Raises RecipeError that says what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}).") from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}: is not JSON (line {error.lineno}: {error.msg}).") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise RecipeError(f"{path}: cannot be read as JSON ({type(error).__name__}).") from None
    folder = isinstance(content, dict) and "layout" in content
    _check(path, content, KEYS | FOLDER_KEYS if folder else KEYS, "a recipe")
    layout, activations = (content["layout"], content["activations"]) if folder else ("gguf", "")
    if layout not in ("gguf", *LAYOUTS) or activations not in ACTIVATIONS:
        raise RecipeError(f"{path}: `layout` is one of {', '.join(LAYOUTS)}, `activations` of {ACTIVATIONS}.")
    if not isinstance(content["rules"], list) or not content["rules"]:
        raise RecipeError(f"{path}: `rules` must be a list of at least one rule.")
    for rule in content["rules"]:
        _check(path, rule, RULE_KEYS, "a rule")
    rules = tuple(Rule(**rule) for rule in content["rules"])
    return Recipe(content["name"], rules, summary=content["summary"], layout=layout, activations=activations)


def _check(path: Path, content: Any, keys: set[str], what: str) -> None:
    if not isinstance(content, dict) or set(content) != keys:
        raise RecipeError(f"{path}: {what} is an object with the keys {', '.join(sorted(keys))}.")
    wrong = [key for key in sorted(keys - {"rules"}) if not isinstance(content[key], str)]
    if wrong:
        raise RecipeError(f"{path}: `{wrong[0]}` must be a text, not {content[wrong[0]]!r}.")
    if any("\ud800" <= letter <= "\udfff" for key in keys - {"rules"} for letter in content[key]):
        raise RecipeError(f"{path}: holds half a character (a lone surrogate), which no file can store.")
