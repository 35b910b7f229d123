"""Faults that were planted are found and named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.models.open import open_model
from whit.pipeline.folder import FolderJob
from whit.pipeline.lint import LLAMA, TRANSFORMERS, VLLM, Finding, lint
from whit.pipeline.quantize import write_gguf
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named

Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]
Change = Callable[[dict[str, Any], Tensors], None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lint") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", folder)
    return folder


def made(llama: Path, kind: str, out: Path, change: Change | None = None) -> list[Finding]:
    """What is found in a folder of this kind after it was changed, but that llama.cpp reads none."""
    recipe = folder_recipe(kind)
    assert recipe is not None
    FolderJob(open_model(llama), recipe).write(out)
    if change:
        config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
        change(config["quantization_config"], tensors)
        (out / "config.json").write_text(json.dumps(config))
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return [each for each in lint(out) if each.runtimes != (LLAMA,)]


@pytest.mark.parametrize("kind", ["gptq-4bit-g32", "gptq-8bit", "awq-4bit-g32", "w4a16-g32", "w8a8", "fp8"])
def test_what_whit_writes_is_clean(llama: Path, tmp_path: Path, kind: str) -> None:
    assert made(llama, kind, tmp_path / "out") == []


def mislabelled(config: dict[str, Any], tensors: Tensors) -> None:
    config["checkpoint_format"] = "gptq_v2"


def another_size(config: dict[str, Any], tensors: Tensors) -> None:
    config["group_size"] = 128


def no_index(config: dict[str, Any], tensors: Tensors) -> None:
    del tensors[f"{Q}.g_idx"]


def another_bits(config: dict[str, Any], tensors: Tensors) -> None:
    config["config_groups"]["group_0"]["targets"] = [f"re:.*{name}$" for name in ("k_proj", "v_proj", "o_proj")]
    config["config_groups"]["group_0"]["targets"] += ["re:.*mlp.*"]
    weights = {**config["config_groups"]["group_0"]["weights"], "observer": "mse"}
    config["config_groups"]["group_1"] = {**config["config_groups"]["group_0"], "weights": weights, "targets": [Q]}
    config["config_groups"]["group_1"]["targets"].append("model.layers.1.self_attn.q_proj")


def old_packing(config: dict[str, Any], tensors: Tensors) -> None:
    packed = tensors[f"{Q}.weight_packed"]
    tensors[f"{Q}.weight_packed"] = torch.cat([packed, packed[:, :1]], dim=1)


def headless(config: dict[str, Any], tensors: Tensors) -> None:
    config["ignore"] = []


CASES = {
    "zero points of another version": ("gptq-4bit-g32", mislabelled, TRANSFORMERS, "off by one step"),
    "group size in the configuration": ("gptq-4bit-g32", another_size, VLLM, "config.json says 128"),
    "group size of AWQ": ("awq-4bit-g32", another_size, VLLM, "config.json says 128"),
    "siblings": ("w4a16-g32", another_bits, VLLM, "one matrix in vLLM"),
    "packing": ("w3a16-g32", old_packing, TRANSFORMERS, "packed as before May 2026"),
    "head": ("w4a16-g32", headless, TRANSFORMERS, "does not name lm_head"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_planted_fault_is_named(llama: Path, tmp_path: Path, case: str) -> None:
    kind, change, runtime, words = CASES[case]
    found = [each for each in made(llama, kind, tmp_path / "out", change) if each.stops and runtime in each.runtimes]
    assert any(words in each.what for each in found), found


def test_a_missing_index_is_a_note(llama: Path, tmp_path: Path) -> None:
    (found,) = made(llama, "gptq-4bit-g32", tmp_path / "out", no_index)
    assert not found.stops
    assert f"1 layers ({Q}) have no g_idx" in found.what


@pytest.mark.parametrize("kind", ["gptq-4bit-g32-asym", "gptq-3bit-g32"])
def test_gptq_that_vllm_runs_slowly_or_not_is_a_note(llama: Path, tmp_path: Path, kind: str) -> None:
    (found,) = made(llama, kind, tmp_path / "out")
    assert found.runtimes == (VLLM,)
    assert not found.stops


def test_a_missing_configuration_is_seen(llama: Path, tmp_path: Path) -> None:
    made(llama, "gptq-4bit-g32", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert any("no quantization_config" in each.what for each in lint(tmp_path / "out"))


def test_whits_own_format_is_for_whit(llama: Path, tmp_path: Path) -> None:
    (found,) = made(llama, "whit-int6", tmp_path / "out")
    assert found.stops
    assert "Whit alone reads" in found.what


def test_gguf_files_are_for_llama_cpp(llama: Path, tmp_path: Path) -> None:
    write_gguf(open_model(llama), recipe_named("q4_0"), tmp_path / "a.gguf")
    assert [each.runtimes for each in lint(tmp_path / "a.gguf")] == [(VLLM,)]
