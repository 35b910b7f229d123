"""Which matrices a share of the weights is, which type they go to, and what that takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import RecipeError
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.folder import plan_model, write_model
from whit.pipeline.salient import Salient, parse_share
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.recipes.recipe import Recipe


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("salient") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", folder)
    return open_model(folder)


def named(name: str) -> Recipe:
    return folder_recipe(name) or recipe_named(name)


def salient(model: Model, name: str, share: float, held: dict[str, str] | None = None) -> Salient:
    return Salient(model, named(name), held or {}, "nearest", share)


def worth(of: Salient, best: str) -> dict[str, dict[str, float]]:
    """All matrices lose alike per weight, but one."""
    lost = {name: 0.1 if name == best else 1e-3 for name in of.candidates}
    return {name: {before: lost[name], after: 0.0} for name, (before, after) in of.candidates.items()}


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), (" 0.5 % ", 0.005), ("0.01", 0.01), ("50%", 0.5)])
def test_shares_as_people_write_them(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "1", "100%", "-1%", "some", "0", "nan", "1e400%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a share of the weights"):
        parse_share(text)


@pytest.mark.parametrize(
    ("recipe", "before", "after"),
    [
        ("q4_0", "q4_0", "q8_0"),
        ("q8_0", "q8_0", "f16"),
        ("w4a16-g32", "int4-g32", "int8-g32"),
        ("w3a16-channel", "int3", "int8"),
        ("mxfp4", "mxfp4", "int8-g32"),
        ("nvfp4", "nvfp4", "int8-g64"),
        ("gptq-4bit-g32", "int4-g32", "int8-g32"),
        ("awq-4bit-g32", "int4-g32-asym", "f16"),
        ("w8a8", "int8", "f16"),
        ("whit-nf4-g32", "nf4-g32", "int8-g32"),
        ("whit-kmeans2", "kmeans2", "int8-g64"),
    ],
)
def test_the_next_better_type(llama: Model, recipe: str, before: str, after: str) -> None:
    assert salient(llama, recipe, 0.5).candidates["blk.1.attn_q.weight"] == (before, after)


@pytest.mark.parametrize("recipe", ["q4_0", "w4a16-g32", "whit-nf4-g32"])
def test_the_most_worthy_go_first_and_the_bytes_are_those_predicted(llama: Model, tmp_path: Path, recipe: str) -> None:
    found = salient(llama, recipe, 0.25)
    chosen = found.chosen(worth(found, "blk.1.attn_k.weight"))
    plan, n_bytes = plan_model(llama, found.recipe(chosen))
    assert "blk.1.attn_k.weight" in chosen[0].names
    assert sum(each.n_weights for each in chosen) <= 0.25 * plan.n_weights
    types = {step.tensor.name: step.type.lower().partition(":")[0] for step in plan.steps}
    assert all(types[name] == each.after for each in chosen for name in each.names)
    before = sum(step.n_bytes for step in plan_model(llama, named(recipe))[0].steps)
    assert sum(step.n_bytes for step in plan.steps) - before == sum(each.n_bytes for each in chosen)
    result = write_model(llama, found.recipe(chosen), tmp_path / "out")
    assert result.n_bytes == n_bytes


def test_what_vllm_multiplies_as_one_goes_together(llama: Model) -> None:
    found = salient(llama, "w4a16-g32", 0.9)
    chosen = found.chosen(worth(found, "blk.1.attn_k.weight"))
    assert chosen[0].names == ("blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_v.weight")
    held = salient(llama, "w4a16-g32", 0.9, {"blk.1.attn_v.weight": "f16"})
    assert "blk.1.attn_k.weight" not in held.candidates
    assert "blk.1.attn_k.weight" in salient(llama, "whit-int4-g32", 0.9, {"blk.1.attn_v.weight": "f16"}).candidates


def test_what_does_not_get_better_is_left(llama: Model) -> None:
    found = salient(llama, "q4_0", 0.9)
    assert found.chosen({name: dict.fromkeys(grids, 1.0) for name, grids in found.candidates.items()}) == ()


@pytest.mark.parametrize(
    ("recipe", "share", "message"),
    [
        ("f16", 0.5, "recipe f16 has no matrix here that could go to a better type"),
        ("q4_0", 1e-4, r"the smallest that can be raised, blk.0.attn_k.weight, has .* % of the weights"),
    ],
)
def test_what_cannot_be_raised_is_said(llama: Model, recipe: str, share: float, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        salient(llama, recipe, share)
