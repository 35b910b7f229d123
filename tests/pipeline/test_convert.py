"""Formats to formats: the same values, whatever way they go."""

from pathlib import Path

import pytest
import torch

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import RecipeError
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.convert import TARGETS, Converted, convert
from whit.pipeline.folder import FolderJob
from whit.pipeline.quantize import write_gguf
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.recipes.recipe import Recipe


def tiny(name: str, folder: Path) -> Path:
    save_tiny(name, folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama" if name in ("llama", "mixtral") else "gpt2", folder)
    return folder


def recipe(name: str) -> Recipe:
    found = folder_recipe(name)
    assert found is not None
    return found


def moved(source: Path, target: str, out: Path, requantize: bool = False) -> Converted:
    return convert(open_model(source), target, out, requantize)


def place(folder: Path, target: str) -> Path:
    return folder / (f"{target}.gguf" if target == "gguf" else target)


def check_same(first: Path, second: Path) -> None:
    one, other = open_model(first).tensors, open_model(second).tensors
    for name in one.names():
        A, B = one.read(name).float(), other.read(name).float()
        if "layers" in name and "norm" not in name and "gate.weight" not in name:
            assert torch.equal(A, B), name
        else:  # floats: half precision on the way
            torch.testing.assert_close(A, B, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_four_bits_in_groups_of_32_go_all_the_way_round(name: str, tmp_path: Path) -> None:
    FolderJob(open_model(tiny(name, tmp_path / "model")), recipe("gptq-4bit-g32")).write(tmp_path / "start")
    last = tmp_path / "start"
    for target in ("awq", "compressed-tensors", "gguf", "whit", "gptq"):
        found = moved(last, target, place(tmp_path, target))
        assert not found.rounded
        assert found.exact > 0
        last = place(tmp_path, target)
        check_same(tmp_path / "start", last)


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors", "whit"])
def test_eight_bits_of_llama_cpp_go_there_and_back(target: str, tmp_path: Path) -> None:
    write_gguf(open_model(tiny("llama", tmp_path / "model")), recipe_named("q8_0"), tmp_path / "a.gguf")
    found = moved(tmp_path / "a.gguf", target, tmp_path / "b")
    assert {each.name for each in found.floats} == {"token_embd.weight", "output.weight"}
    check_same(tmp_path / "a.gguf", tmp_path / "b")
    moved(tmp_path / "b", "gguf", tmp_path / "c.gguf")
    check_same(tmp_path / "a.gguf", tmp_path / "c.gguf")
    before, after = open_model(tmp_path / "a.gguf").gguf_tensors, open_model(tmp_path / "c.gguf").gguf_tensors
    assert before is not None
    assert after is not None
    for name in before.names():
        if name.startswith("blk."):
            assert after.info(name).dtype == before.info(name).dtype
            assert torch.equal(after.raw(name), before.raw(name))


def test_conv1d_goes_from_llama_cpp_to_gptq(tmp_path: Path) -> None:
    write_gguf(open_model(tiny("gpt2", tmp_path / "model")), recipe_named("q4_0"), tmp_path / "a.gguf")
    assert not moved(tmp_path / "a.gguf", "gptq", tmp_path / "b").rounded
    one, other = open_model(tmp_path / "a.gguf").tensors, open_model(tmp_path / "b").tensors
    name = "transformer.h.1.attn.c_attn.weight"
    assert torch.equal(one.read(name), other.read(name))


def test_larger_groups_become_smaller_ones_where_blocks_are_small(tmp_path: Path) -> None:
    FolderJob(open_model(tiny("llama", tmp_path / "model")), recipe("gptq-4bit-g64")).write(tmp_path / "start")
    found = moved(tmp_path / "start", "gguf", tmp_path / "a.gguf")
    assert not found.rounded
    check_same(tmp_path / "start", tmp_path / "a.gguf")


def test_zero_points_of_four_bits_take_one_more_bit_in_llama_cpp(tmp_path: Path) -> None:
    FolderJob(open_model(tiny("llama", tmp_path / "model")), recipe("awq-4bit-g32")).write(tmp_path / "start")
    found = moved(tmp_path / "start", "gguf", tmp_path / "a.gguf")
    assert not found.rounded
    assert {step.type for step in found.result.plan.steps} <= {"F32", "F16", "Q5_0", "Q4_0"}
    check_same(tmp_path / "start", tmp_path / "a.gguf")


def test_zero_points_of_eight_bits_have_no_place_there_and_that_is_said_with_a_number(tmp_path: Path) -> None:
    FolderJob(open_model(tiny("llama", tmp_path / "model")), recipe("gptq-8bit-g32-asym")).write(tmp_path / "start")
    with pytest.raises(RecipeError, match=r"gguf cannot hold \d+ of 14 matrices as they are.*%.*--requantize"):
        moved(tmp_path / "start", "gguf", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
    found = moved(tmp_path / "start", "gguf", tmp_path / "a.gguf", requantize=True)
    assert found.rounded
    assert max(each.error for each in found.rounded) < 0.02
    assert {each.target for each in found.rounded} == {"q8_0"}


@pytest.mark.parametrize("kind", ["gptq-3bit-g32-asym", "w5a16-g32", "w8a8", "fp8", "mxfp4", "whit-iq4_nl"])
@pytest.mark.parametrize("target", ["f16", "bf16", "f32"])
def test_everything_becomes_floats(kind: str, target: str, tmp_path: Path) -> None:
    FolderJob(open_model(tiny("llama", tmp_path / "model")), recipe(kind)).write(tmp_path / "start")
    moved(tmp_path / "start", target, tmp_path / "out")
    found: Model = open_model(tmp_path / "out")
    assert not found.quantization
    for name in found.tensors.names():
        expected = open_model(tmp_path / "start").tensors.read(name).float()
        torch.testing.assert_close(found.tensors.read(name).float(), expected, rtol=1e-2, atol=1e-4)


def test_formats_have_names(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"Known: {', '.join(TARGETS)}"):
        moved(tiny("llama", tmp_path / "model"), "exl2", tmp_path / "out")
