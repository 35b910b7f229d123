"""Mixtures against the types in files that llama.cpp's quantizer wrote (bench/mixtures.py)."""

import json
from pathlib import Path

import pytest

from whit.errors import RecipeError
from whit.recipes.mixtures import BASE, Facts, mixture
from whit.recipes.named import recipe_named, resolved

PEER = json.loads((Path(__file__).parent / "mixtures.json").read_text())


@pytest.mark.parametrize("case", PEER, ids=lambda case: f"{case['model']}-{case['recipe']}-{case['importance']}")
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(case: dict) -> None:  # type: ignore[type-arg]
    facts = Facts(case["blocks"], case["experts"], case["heads_per_kv"], case["tied"], case["importance"])
    shapes = [(name, tuple(shape)) for name, shape, _ in case["tensors"]]
    kinds = mixture(case["recipe"], shapes, facts)
    assert kinds == {name: kind for name, _, kind in case["tensors"]}


def test_overrides_come_first_and_the_last_one_wins() -> None:
    recipe = recipe_named("q4_k_m", settings=("blk.*.ffn_down=q6_k", "blk.0.*=q8_0"))
    shapes = [(f"blk.{name}.weight", (8, 256)) for name in ("0.ffn_down", "1.ffn_down", "1.attn_q")]
    full = resolved(recipe, shapes, Facts(2, 0, 1, True, False))
    assert [full.rule_for([name]).grid for name, _ in shapes] == ["q8_0", "q6_k", "q4_k"]


@pytest.mark.parametrize("setting", ["blk.0.ffn_down", "=q4_k", "blk.*="])
def test_an_override_of_another_form_is_explained(setting: str) -> None:
    with pytest.raises(RecipeError, match="pattern=grid"):
        recipe_named("q4_k_m", settings=(setting,))


def test_an_override_that_matches_nothing_is_refused() -> None:
    recipe = recipe_named("q4_k_m", settings=("blk.*.ffn_dwon=q6_k",))
    with pytest.raises(RecipeError, match=r"blk\.\*\.ffn_dwon\.weight matches no tensor"):
        resolved(recipe, [("blk.0.ffn_down.weight", (8, 256))], Facts(1, 0, 1, True, False))


@pytest.mark.parametrize("name", BASE)
def test_pure_means_one_type(name: str) -> None:
    full = resolved(recipe_named(name, pure=True), [("blk.0.attn_v.weight", (8, 256))], Facts(1, 8, 8, True, True))
    assert {rule.grid for rule in full.rules} == {BASE[name]}
