"""Every grid of few floating-point bits in every place where it makes sense, and a sentence where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.quantized import QuantizedTensors
from whit.cli.app import run
from whit.grids.named import grid_name, grid_named
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.effort import PRESETS, Calibration
from whit.pipeline.folder import FolderJob
from whit.pipeline.formats import FOLDERS
from whit.pipeline.keep import kept, matrix_names, with_kept
from whit.recipes.folders import folder_recipe

TOKENS = torch.tensor([random_tokens(24)])
# recipe -> layout, grid, relative error of a random layer at most
RECIPES = {
    "nf4": ("whit", "nf4-g64", 0.10),
    "fp4": ("whit", "fp4-g64", 0.12),
    "whit-nf4-g32": ("whit", "nf4-g32", 0.09),
    "whit-fp8": ("whit", "fp8", 0.03),
    "whit-fp8-e5m2": ("whit", "fp8-e5m2", 0.06),
    "whit-mxfp4": ("whit", "mxfp4", 0.14),
    "whit-nvfp4": ("whit", "nvfp4", 0.11),
    "fp8": ("compressed-tensors", "fp8", 0.03),
    "mxfp4": ("compressed-tensors", "mxfp4", 0.14),
    "nvfp4": ("compressed-tensors", "nvfp4", 0.11),
}
GRIDS = ("nf4-g64", "fp4-g64", "fp8", "fp8-e5m2", "mxfp4", "nvfp4")
HELD = {  # layout -> grids of these that it holds
    "whit": set(GRIDS),
    "compressed-tensors": {"fp8", "mxfp4", "nvfp4"},
    "gptq": set(),
    "awq": set(),
}
KINDS = {"compressed-tensors": "w4a16-g32", "whit": "whit-int4-g32", "gptq": "gptq-4bit-g32", "awq": "awq-4bit-g32"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB, intermediate_size=128, max_position_embeddings=512)
    save_toy_tokenizer("llama", folder)
    return folder


@pytest.fixture(scope="module")
def folders(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    found = {}
    for name in RECIPES:
        recipe = folder_recipe(name)
        assert recipe is not None
        FolderJob(open_model(llama), recipe).write(root / name)
        found[name] = root / name
    return found


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(TOKENS).logits.float()


def error_of(folder: Path, llama: Path) -> float:
    layer = "model.layers.0.mlp.up_proj.weight"
    W = open_model(llama).tensors.read(layer).float()
    return ((open_model(folder).tensors.read(layer).float() - W).norm() / W.norm()).item()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_writes_its_grid_and_says_so(llama: Path, folders: dict[str, Path], name: str) -> None:
    layout, grid, most = RECIPES[name]
    config = json.loads((folders[name] / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == layout
    tensors = open_model(folders[name]).tensors
    assert isinstance(tensors, QuantizedTensors)
    found = {grid_name(tensors.quantized(each).grid) for each in tensors.names() if tensors.is_quantized(each)}
    assert found == {grid}
    assert 0 < error_of(folders[name], llama) < most


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("whit-nf4")])
@pytest.mark.parametrize("rounding", ["search", "feedback"])
def test_other_roundings_lose_less_than_the_nearest(
    llama: Path, folders: dict[str, Path], tmp_path: Path, name: str, rounding: str
) -> None:
    windows = torch.randint(3, TOY_VOCAB, (8, 32), generator=torch.Generator().manual_seed(0))
    recipe = folder_recipe(name, rounding)
    assert recipe is not None
    calibration = Calibration(windows, effort=PRESETS["fast"].effort)
    result = FolderJob(open_model(llama), recipe).write(tmp_path / "out", calibration=calibration)
    if rounding == "search":
        assert error_of(tmp_path / "out", llama) <= error_of(folders[name], llama)
    else:
        assert sum(each.loss for each in result.losses) < 0.9 * sum(each.plain for each in result.losses)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_inspected_measured_and_made_float_again(
    llama: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(["inspect", str(folders[name])]) == 0
    assert "bits per weight" in capsys.readouterr().out
    assert run(["eval", str(folders[name]), "--against", str(llama), "--windows", "1"]) == 0
    assert "KL" in capsys.readouterr().out
    assert run(["convert", str(folders[name]), "--format", "f32", "-o", str(tmp_path / "f32")]) == 0
    back, codes = open_model(tmp_path / "f32").tensors, open_model(folders[name]).tensors
    assert all(torch.equal(back.read(each).float(), codes.read(each).float()) for each in codes.names())


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("target", ["whit", "compressed-tensors", "gptq", "gguf"])
def test_conversion_is_exact_where_the_target_has_the_grid_and_refused_elsewhere(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, target: str
) -> None:
    _, grid, _ = RECIPES[name]
    out = tmp_path / ("out.gguf" if target == "gguf" else "out")
    held = grid == "mxfp4" if target == "gguf" else grid.replace("-g32", "-g64") in HELD[target]
    assert run(["convert", str(folders[name]), "--format", target, "-o", str(out)]) == (0 if held else 2)
    if held:
        source, found = open_model(folders[name]).tensors, open_model(out).tensors
        layer = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(source.read(layer).float(), found.read(layer).float())
    else:
        assert f"{target} cannot hold" in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.parametrize("layout", HELD)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_layer_is_kept_on_it_or_refused_with_a_sentence(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, grid: str
) -> None:
    arguments = ["--recipe", KINDS[layout], "--rounding", "nearest", "--keep", f"*.down_proj={grid}"]
    status = run(["quantize", str(llama), *arguments, "-o", str(tmp_path / "out")])
    shown = capsys.readouterr()
    if grid in HELD[layout]:
        assert status == 0
        assert f"kept, {grid}: 2 x blk.*.ffn_down.weight" in shown.out
        tensors = open_model(tmp_path / "out").tensors
        assert isinstance(tensors, QuantizedTensors)
        assert grid_name(tensors.quantized("model.layers.0.mlp.down_proj.weight").grid) == grid
    else:
        assert status == 2
        assert "quantizes nothing here" in shown.err or "cannot be on" in shown.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", [layout for layout, held in HELD.items() if held])
def test_budgets_choose_from_all_that_a_layout_holds(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    held = sorted(HELD[layout])
    fit = ["--bpw", "10.8", "--format", layout, "--types", ",".join(held), "--rounding", "nearest", "--windows", "2"]
    fit += ["--calib", "docs", "--keep", "model.layers.0.self_attn.[qkv]_proj=fp8"]
    assert run(["quantize", str(llama), *fit, "-o", str(tmp_path / "out")]) == 0
    tensors = open_model(tmp_path / "out").tensors
    assert isinstance(tensors, QuantizedTensors)
    used = {grid_name(tensors.quantized(each).grid) for each in tensors.names() if tensors.is_quantized(each)}
    assert used <= set(held)
    assert len(used) > 1
    capsys.readouterr()
    assert run(["quantize", str(llama), *fit[:4], "--types", "q4_0,awq-4bit", "-o", str(tmp_path / "no")]) == 2
    assert "--types" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fp8", "nvfp4", "mxfp4"])
def test_transformers_reads_them_beside_integers(llama: Path, tmp_path: Path, kind: str) -> None:
    model, recipe = open_model(llama), folder_recipe("w4a16-g32")
    assert recipe is not None
    mixed = with_kept(recipe, kept(model, [f"*.down_proj={kind}"], recipe.layout), matrix_names(model), "nearest")
    FolderJob(model, mixed).write(tmp_path / "out")
    mine = logits(load_module(open_model(tmp_path / "out")))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, attn_implementation="eager")
    assert (logits(theirs.eval()) - mine).norm() < 0.03 * mine.norm()  # bfloat16: it decodes FP4 to nothing else


@pytest.mark.parametrize("layout", FOLDERS)
@pytest.mark.parametrize("grid", [*GRIDS, "codebook4", "q4_k", "f16", "int4-g16-min", "int4-g128:g_idx", "fp8-tensor"])
def test_every_layout_answers_for_every_grid(layout: str, grid: str) -> None:
    found = FOLDERS[layout].layout(grid_named(grid)).refuses(grid_named(grid), (128, 256))
    assert found is None or (isinstance(found, str) and found)


def test_gguf_keeps_layers_on_mxfp4_alone(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for grid in GRIDS:
        arguments = ["--recipe", "q4_0", "--rounding", "nearest", "--keep", f"*.down_proj={grid}", "--force"]
        status = run(["quantize", str(llama), *arguments, "-o", str(tmp_path / "a.gguf")])
        assert status == (0 if grid == "mxfp4" else 2)
        assert status == 0 or f"GGUF has no type {grid}" in capsys.readouterr().err
