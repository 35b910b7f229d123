"""GPT-OSS from end to end: as published (experts in MXFP4), through every way that leads to a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamacpp import llama_cpp_logits
from tiny import random_tokens, save_mxfp4
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.stacked import StackedTensors
from whit.cli.app import run
from whit.errors import RecipeError
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.convert import convert
from whit.pipeline.effort import Calibration
from whit.pipeline.folder import FolderJob
from whit.pipeline.keep import keeping
from whit.pipeline.quantize import write_gguf
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.recipes.recipe import Recipe, Rule
from whit.rounding.methods import Effort

EXPERTS = Recipe("experts", (Rule("*_exps.weight", "mxfp4"), Rule("*", "f32")))
STACKS = {f"blk.{i}.ffn_{part}_exps.weight" for i in range(2) for part in ("gate", "up", "down")}
TOKENS = random_tokens(40)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    save_mxfp4(folder, vocab_size=TOY_VOCAB, max_position_embeddings=512)
    save_toy_tokenizer("gpt2", folder)
    return folder


@pytest.fixture(scope="module")
def expected(published: Path) -> np.ndarray:
    """Logits of transformers, which decodes the folder itself."""
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32, attn_implementation="eager").float()
    return logits(model)


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].float().numpy()


def difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of every position, relative to the largest logit."""
    return np.abs(found - expected).max(1) / np.abs(expected).max()


def copied(file: GGUFFile, published: Path) -> set[str]:
    """The tensors that have the very blocks and scales of the folder."""
    source = open_model(published).tensors
    assert isinstance(source, StackedTensors)
    ways = {"gate": ("gate_up_proj", 0, 2), "up": ("gate_up_proj", 1, 2), "down": ("down_proj", 0, 1)}
    found = set()
    for name in STACKS:
        block, part = name.split(".")[1], name.split("_")[1]
        stack, at, of = ways[part]
        raw = source.ggml(f"model.layers.{block}.mlp.experts.{stack}", at, of)
        if file.info(name).dtype == "MXFP4" and torch.equal(file.raw(name), raw):
            found.add(name)
    return found


def test_experts_go_into_a_file_bit_for_bit(published: Path, expected: np.ndarray, tmp_path: Path) -> None:
    model, path = open_model(published), tmp_path / "a.gguf"
    write_gguf(model, EXPERTS, path)
    assert copied(GGUFFile(path), published) == STACKS
    assert difference(logits(load_module(model)), expected).max() < 1e-5
    assert difference(logits(load_module(open_model(path))), expected).max() < 1e-5
    # llama.cpp rounds what arrives at MXFP4 to 8 bits; a router on the edge may then choose another expert.
    assert np.median(difference(llama_cpp_logits(path, TOKENS), expected)) < 0.02


def test_a_calibrated_run_copies_them_and_rounds_the_rest(published: Path, tmp_path: Path) -> None:
    text = torch.tensor(random_tokens(4 * 32)).view(4, 32)
    calibration, path = Calibration(text, 0.5, Effort(sweeps=1)), tmp_path / "a.gguf"
    mixed = Recipe("mixed", (Rule("*_exps.weight", "mxfp4", "feedback"), Rule("*", "q4_0", "feedback")))
    result = write_gguf(open_model(published), mixed, path, calibration=calibration)
    assert copied(GGUFFile(path), published) == STACKS
    assert {each.name for each in result.losses} & STACKS == set()
    assert "blk.1.attn_output.weight" in {each.name for each in result.losses}


def test_other_recipes_round_the_decoded_values(published: Path, tmp_path: Path) -> None:
    text = torch.tensor(random_tokens(4 * 32)).view(4, 32)
    calibration, path = Calibration(text, 0.5, Effort(sweeps=1)), tmp_path / "a.gguf"
    result = write_gguf(open_model(published), recipe_named("q4_0", "feedback"), path, calibration=calibration)
    assert {GGUFFile(path).info(name).dtype for name in STACKS} == {"Q4_0"}
    experts = [each for each in result.losses if each.name in STACKS]
    assert len(experts) == 3 * len(STACKS)  # of every expert
    gate, up = (
        [each.n_tokens for each in result.losses if f".1.ffn_{part}_exps" in each.name] for part in ("gate", "up")
    )
    assert gate == up
    assert sum(gate) == 2 * text.numel()  # a token visits two
    assert sum(each.loss for each in experts) < sum(each.plain for each in experts)


def test_folders_have_no_place_for_them(published: Path, tmp_path: Path) -> None:
    model, recipe = open_model(published), folder_recipe("w4a16-g32")
    assert recipe is not None
    with pytest.raises(RecipeError, match=r"all experts of a block in one tensor.*mxfp4_moe.*--keep"):
        FolderJob(model, recipe)
    FolderJob(model, keeping(model, recipe, ["*_exps.weight=f16"], "nearest")[0]).write(tmp_path / "out")
    found, source = open_model(tmp_path / "out").tensors, model.tensors
    for name in source.names():
        if "experts" in name:
            assert torch.equal(found.read(name).float(), source.read(name).float()), name
    with pytest.raises(RecipeError, match="in one tensor"):
        convert(model, "gptq", tmp_path / "b", requantize=True)


def test_conversions_are_exact(published: Path, expected: np.ndarray, tmp_path: Path) -> None:
    model = open_model(published)
    assert not convert(model, "gguf", tmp_path / "a.gguf", requantize=False).rounded
    assert copied(GGUFFile(tmp_path / "a.gguf"), published) == STACKS
    convert(model, "bf16", tmp_path / "floats", requantize=False)
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32, attn_implementation="eager")
    assert difference(logits(floats), expected).max() < 1e-5


@pytest.mark.parametrize("verb", ["inspect", "plan", "memory"])
def test_commands_read_headers(published: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--recipe", "mxfp4_moe", "--no-time"] if verb == "plan" else []
    assert run([verb, str(published), *more]) == 0
    shown = capsys.readouterr().out
    assert {"inspect": "mxfp4", "plan": "biases stay in float", "memory": "GB"}[verb] in shown


def test_a_file_made_and_measured_on_the_command_line(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "a.gguf", tmp_path / "mine.txt"
    text.write_text("A text of my own about nothing much. " * 200)
    recipe = ["--recipe", "mxfp4_moe", "--preset", "fast", "--windows", "2", "--calib", str(text), "--no-verify"]
    assert run(["quantize", str(published), *recipe, "-o", str(out)]) == 0
    assert copied(GGUFFile(out), published) == STACKS
    assert "already quantized" not in capsys.readouterr().out  # there is no other original
    assert run(["eval", str(out), "--against", str(published), "--windows", "1", "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kl_mean"] < 0.02
