"""Mixtures against the types in files that llama.cpp's quantizer wrote (bench/mixtures.py)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from whit.errors import RecipeError
from whit.recipes.mixtures import BASE, Facts, mixture
from whit.recipes.named import recipe_named, resolved
from whit.recipes.recipe import Rule

PEER = json.loads((Path(__file__).parent / "mixtures.json").read_text())


@pytest.mark.parametrize("case", PEER, ids=lambda case: f"{case['model']}-{case['recipe']}-{case['importance']}")
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(case: dict) -> None:  # type: ignore[type-arg]
    facts = Facts(case["blocks"], case["experts"], case["heads_per_kv"], case["tied"], case["importance"])
    shapes = [(name, tuple(shape)) for name, shape, _ in case["tensors"]]
    kinds = mixture(case["recipe"], shapes, facts)
    assert kinds == {name: kind for name, _, kind in case["tensors"]}


def test_rules_by_hand_come_first() -> None:
    recipe = recipe_named("q4_k_m")
    recipe = replace(recipe, rules=(Rule("blk.0.*", "q8_0"), Rule("blk.*.ffn_down.weight", "q6_k")), n_overrides=2)
    shapes = [(f"blk.{name}.weight", (8, 256)) for name in ("0.ffn_down", "1.ffn_down", "1.attn_q")]
    full = resolved(recipe, shapes, Facts(2, 0, 1, True, False))
    assert [full.rule_for([name]).grid for name, _ in shapes] == ["q8_0", "q6_k", "q4_k"]


def test_a_rule_by_hand_that_matches_nothing_is_refused() -> None:
    recipe = replace(recipe_named("q4_k_m"), rules=(Rule("blk.*.ffn_dwon.weight", "q6_k"),), n_overrides=1)
    with pytest.raises(RecipeError, match=r"blk\.\*\.ffn_dwon\.weight matches no tensor"):
        resolved(recipe, [("blk.0.ffn_down.weight", (8, 256))], Facts(1, 0, 1, True, False))


@pytest.mark.parametrize("name", BASE)
def test_pure_means_one_type(name: str) -> None:
    full = resolved(recipe_named(name, pure=True), [("blk.0.attn_v.weight", (8, 256))], Facts(1, 8, 8, True, True))
    assert {rule.grid for rule in full.rules} == {BASE[name]}
