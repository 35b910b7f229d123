import pytest

from whit.errors import RecipeError
from whit.grids.named import grid_name, grid_named
from whit.recipes.folders import EXAMPLES, folder_recipe


@pytest.mark.parametrize(
    ("name", "layout", "grid"),
    [
        ("gptq-4bit-g128", "gptq", "int4-g128"),
        ("GPTQ-3bit-g64-asym", "gptq", "int3-g64-asym"),
        ("gptq-8bit", "gptq", "int8"),
        ("awq-4bit-g64", "awq", "int4-g64-asym"),
        ("w4a16", "compressed-tensors", "int4-g128"),
        ("w8a16-channel", "compressed-tensors", "int8"),
        ("w3a16-g128", "compressed-tensors", "int3-g128"),
        ("w8a8", "compressed-tensors", "int8"),
        ("fp8", "compressed-tensors", "fp8"),
        ("whit-iq4_nl", "whit", "iq4_nl"),
    ],
)
def test_names_say_layout_and_grid(name: str, layout: str, grid: str) -> None:
    found = folder_recipe(name, "feedback")
    assert found is not None
    assert found.layout == layout
    assert grid_named(found.rules[-1].grid) == grid_named(grid)
    assert found.rules[-1].rounding == "feedback"
    assert found.rule_for(["token_embd.weight", "output.weight"]).grid == "f16"


def test_activations_are_part_of_the_name() -> None:
    found = {name for name in EXAMPLES if folder_recipe(name).activations}
    assert found == {"w8a8", "w8a8-static", "fp8", "fp8-static"}


def test_other_names_are_not_of_this_kind() -> None:
    assert folder_recipe("q4_k_m") is None
    assert folder_recipe("gptq-5bit") is None


def test_grids_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RecipeError, match="groups have 32, 64 or 128"):
        folder_recipe("gptq-4bit-g100")
    with pytest.raises(RecipeError, match="q9"):
        folder_recipe("whit-q9")


@pytest.mark.parametrize(("name", "grid"), [("nf4", "nf4-g64"), ("FP4", "fp4-g64"), ("whit-nf4", "nf4")])
def test_four_bit_floats_without_a_public_layout_go_to_whits_own(name: str, grid: str) -> None:
    found = folder_recipe(name)
    assert found is not None
    assert found.layout == "whit"
    assert grid_named(found.rules[-1].grid) == grid_named(grid)


def test_fp4_with_half_precision_scales_has_a_name_of_its_own() -> None:
    assert grid_name(grid_named("fp4-g32")) == "fp4-g32"
    assert grid_name(grid_named("fp4-g32:bf16")) == "fp4-g32:bf16"
    assert grid_name(grid_named("mxfp4")) == "mxfp4"
