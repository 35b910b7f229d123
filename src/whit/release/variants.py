"""What a release consists of: recipes by the names that people look for, and what their files are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from whit.errors import RecipeError
from whit.models.model import Model
from whit.pipeline.folder import plan_model
from whit.pipeline.plan import Plan
from whit.recipes.files import read_recipe
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.recipes.recipe import Recipe

AUTO = "auto"
ROUNDING = "feedback"
GGUF = "gguf"
LADDER = ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "gptq-4bit", "awq-4bit", "w8a8")
SHORT = {"gptq-4bit": "gptq-4bit-g128", "awq-4bit": "awq-4bit-g128"}  # as these are published everywhere
_WORDS = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "nf4": "NF4", "fp4": "FP4", "mxfp4": "MXFP4", "nvfp4": "NVFP4"}


@dataclass(frozen=True)
class Variant:
    """One file or folder of a release.

    name    as it was asked for
    file    what it is called
    plan    what every tensor becomes; its recipe is spelled out for this model
    n_bytes of its weight files
    """

    name: str
    file: str
    plan: Plan
    n_bytes: int

    @property
    def recipe(self) -> Recipe:
        """With a rule for every tensor."""
        return self.plan.recipe

    @property
    def is_gguf(self) -> bool:
        """A file for llama.cpp, rather than a folder for GPUs."""
        return self.recipe.layout == GGUF


def variants_of(model: Model, text: str, base: str) -> tuple[list[Variant], list[str]]:
    """The variants that a person listed, and why any of `auto` is left out.

    text  names of recipes or JSON files, with commas between them; `auto` for the usual ones
    base  name of the model, for files
    Raises RecipeError for a name that does not exist or comes twice, or a recipe that the model cannot follow.
    """
    if text.strip().lower() == AUTO:
        return _usual(model, base)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RecipeError("--variants is empty. Give `auto`, or names such as q4_k_m,q8_0,gptq-4bit.")
    found = [_variant(model, name, base) for name in names]
    files = [each.file.lower() for each in found]  # some disks make no difference between cases
    twice = next((each for each, file in zip(found, files, strict=True) if files.count(file) > 1), None)
    if twice is not None:
        raise RecipeError(f"--variants: {twice.file} would be written twice. Name every variant once.")
    return found, []


def _usual(model: Model, base: str) -> tuple[list[Variant], list[str]]:
    found: list[Variant] = []
    left_out: list[str] = []
    for name in LADDER:
        try:
            each = _variant(model, name, base)
        except RecipeError as error:
            left_out.append(f"{name}: {error}")
            continue
        kinds = [(step.tensor.name, step.type) for step in each.plan.steps]
        alike = [other for other in found if other.recipe.layout == each.recipe.layout]
        same = [other for other in alike if [(s.tensor.name, s.type) for s in other.plan.steps] == kinds]
        if same:
            left_out.append(f"{name}: for this model it has the same type for every tensor as {same[0].name}")
        else:
            found.append(each)
    if not found:
        raise RecipeError(f"None of the usual variants is possible: {'; '.join(left_out)}")
    return found, left_out


def _variant(model: Model, name: str, base: str) -> Variant:
    if name.endswith(".json"):
        recipe = read_recipe(Path(name))
    else:
        full = SHORT.get(name.lower(), name)
        recipe = folder_recipe(full, ROUNDING) or recipe_named(full, ROUNDING)
    short = {full: name for name, full in SHORT.items()}.get(recipe.name, recipe.name)
    title = re.sub(r"[^A-Za-z0-9._+-]+", "-", short).strip(".-") or "recipe"
    plan, n_bytes = plan_model(model, recipe)
    if recipe.layout == GGUF:
        return Variant(name, f"{base}.{title.upper()}.gguf", plan, n_bytes)
    head, dash, rest = title.partition("-")
    return Variant(name, f"{base}-{_WORDS.get(head, head.upper())}{dash}{rest}", plan, n_bytes)
