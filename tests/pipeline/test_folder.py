"""Folders for GPUs, read back by Whit, and by transformers with compressed-tensors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny import TINY, random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.quantized import QuantizedTensors
from whit.errors import OutputError, RecipeError
from whit.grids.named import grid_named
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.effort import PRESETS, Calibration
from whit.pipeline.folder import FolderJob
from whit.pipeline.keep import keeping
from whit.recipes.folders import folder_recipe
from whit.recipes.recipe import Recipe, Rule
from whit.rounding.nearest import nearest

TOKENS = torch.tensor([random_tokens(24)])


def recipe(name: str, rounding: str = "nearest") -> Recipe:
    found = folder_recipe(name, rounding)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", folder)
    return folder


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(TOKENS).logits.float()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["whit-int4-g32", "gptq-4bit-g32", "w4a16-g32-asym"])
def test_every_layer_is_its_weight_rounded(name: str, kind: str, tmp_path: Path) -> None:
    """Rows are rounded alone, so a layer must be what rounding the folder's own weight gives, wherever it went."""
    save_tiny(name, tmp_path / "model")
    source = open_model(tmp_path / "model")
    if name == "gpt2" and kind.startswith("w4"):
        with pytest.raises(RecipeError, match="nn.Linear alone, not Conv1D"):
            FolderJob(source, recipe(kind))
        return
    if name == "gpt_oss":
        with pytest.raises(RecipeError, match="all experts of a block in one tensor"):
            FolderJob(source, recipe(kind))
        return
    job = FolderJob(source, recipe(kind))
    result = job.write(tmp_path / "out")
    assert result.n_bytes == job.n_bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("model*"))
    found = open_model(tmp_path / "out").tensors
    assert isinstance(found, QuantizedTensors)
    assert set(found.names()) == set(source.tensors.names())
    grid = grid_named("int4-g32-asym" if "asym" in kind else "int4-g32")
    n_quantized = 0
    for weight in source.tensors.names():
        W, Q = source.tensors.read(weight).float(), found.read(weight).float()
        assert W.shape == Q.shape
        if not found.is_quantized(weight):
            if "embed_positions" in weight:  # the first two rows are never used, and not in GGUF's names
                W, Q = W[2:], Q[2:]
            torch.testing.assert_close(Q, W, rtol=1e-3, atol=1e-7)
            continue
        n_quantized += 1
        expected = nearest(W, grid).dequantize() if found.quantized(weight).shape == W.shape else None
        if expected is None or not torch.equal(Q, expected):
            expected = nearest(W.T, grid).dequantize().T  # a Conv1D
        torch.testing.assert_close(Q, expected, rtol=1e-3, atol=1e-7)  # OPT's rows are scaled on their way
    assert n_quantized > 0


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "qwen2", "gemma3_text", "phi3", "gpt_neox", "opt"])
@pytest.mark.parametrize("kind", ["w4a16-g32", "w3a16-g32", "w8a16-channel", "w8a8", "fp8"])
def test_transformers_computes_the_same_logits(name: str, kind: str, tmp_path: Path) -> None:
    if name == "opt" and kind in ("w8a8", "fp8"):
        pytest.skip("the package's scales are not per token where OPT flattens its tokens")
    save_tiny(name, tmp_path / "model")
    FolderJob(open_model(tmp_path / "model"), recipe(kind)).write(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    mine = logits(load_module(open_model(tmp_path / "out")))
    assert (logits(theirs.eval()) - mine).norm() < 1e-4 * mine.norm()


def test_mixed_grids_are_groups_that_transformers_reads(llama: Path, tmp_path: Path) -> None:
    mixed = folder_recipe("w4a16-g32")
    assert mixed is not None
    rules = (Rule("blk.0.attn_q.weight", "f16"), Rule("blk.*.ffn_down.weight", "int8"))
    FolderJob(open_model(llama), replace(mixed, rules=(*rules, *mixed.rules))).write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    assert config["ignore"] == ["lm_head", "model.layers.0.self_attn.q_proj"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    mine = logits(load_module(open_model(tmp_path / "out")))
    assert (logits(theirs.eval()) - mine).norm() < 1e-4 * mine.norm()


@pytest.mark.parametrize(
    ("name", "other"), [("gptq-4bit-g32", "int4-g32-asym"), ("gptq-4bit-g32-asym", "int4-g32")], ids=["one", "most"]
)
def test_all_layers_of_a_gptq_folder_have_zero_points_of_its_one_version(
    llama: Path, tmp_path: Path, name: str, other: str
) -> None:
    mixed, _ = keeping(open_model(llama), recipe(name), [f"blk.*.ffn_down={other}"], "nearest")
    FolderJob(open_model(llama), mixed).write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"
    found = open_model(tmp_path / "out").tensors
    assert isinstance(found, QuantizedTensors)
    layer = f"model.layers.0.mlp.{'down' if name.endswith('asym') else 'up'}_proj.weight"
    qzeros = found.stored(layer, "qzeros")
    assert qzeros is not None
    assert {word & 0xFFFFFFFF for word in qzeros.flatten().tolist()} == {0x88888888}
    for weight in (name for name in found.names() if found.is_quantized(name)):
        W = open_model(llama).tensors.read(weight)
        grid = grid_named(other if "down_proj" in weight else "int4-g32-asym" if "asym" in name else "int4-g32")
        assert torch.equal(found.read(weight).float(), nearest(W, grid).dequantize().float())


@pytest.mark.parametrize("kind", ["w8a8-static", "fp8-static"])
def test_fixed_scales_of_activations_are_those_that_transformers_uses(llama: Path, tmp_path: Path, kind: str) -> None:
    windows = torch.randint(3, TOY_VOCAB, (8, 32), generator=torch.Generator().manual_seed(0))
    original = logits(load_module(open_model(llama)))
    job = FolderJob(open_model(llama), recipe(kind, "feedback"))
    result = job.write(tmp_path / "out", calibration=Calibration(windows, effort=PRESETS["fast"].effort))
    assert result.n_bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("model*"))
    mine = logits(load_module(open_model(tmp_path / "out")))
    assert (mine - original).norm() < 0.2 * original.norm()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    assert (logits(theirs.eval()) - mine).norm() < 1e-4 * mine.norm()


@pytest.mark.parametrize("kind", ["w8a8-static", "fp8-static"])
def test_fixed_scales_need_text(llama: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(RecipeError, match="found on text"):
        FolderJob(open_model(llama), recipe(kind)).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_transformers_reads_four_bit_floats(llama: Path, tmp_path: Path, kind: str) -> None:
    FolderJob(open_model(llama), recipe(kind)).write(tmp_path / "out")
    mine = logits(load_module(open_model(tmp_path / "out")))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, attn_implementation="eager")
    assert (logits(theirs.eval()) - mine).norm() < 0.03 * mine.norm()  # bfloat16: it decodes to nothing else


@pytest.mark.parametrize("kind", ["gptq-4bit-g32", "awq-4bit-g32", "w4a16-g32"])
def test_calibrated_rounding_loses_less_than_plain(llama: Path, tmp_path: Path, kind: str) -> None:
    windows = torch.randint(3, TOY_VOCAB, (8, 32), generator=torch.Generator().manual_seed(0))
    original = logits(load_module(open_model(llama)))
    lost = []
    for rounding in ("nearest", "feedback"):
        job = FolderJob(open_model(llama), recipe(kind, rounding))
        job.write(tmp_path / rounding, calibration=Calibration(windows, effort=PRESETS["fast"].effort))
        lost.append((logits(load_module(open_model(tmp_path / rounding))) - original).norm().item())
    assert lost[1] < 0.9 * lost[0]


def test_the_same_input_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        FolderJob(open_model(llama), recipe("gptq-4bit-g32-asym")).write(tmp_path / out)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_what_belongs_to_the_model_travels_along(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    FolderJob(open_model(source), recipe("w4a16-g32")).write(tmp_path / "out")
    files = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"}
    for file in {"chat_template.jinja", *(files & {each.name for each in source.iterdir()})}:
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()


def test_a_group_that_does_not_divide_the_rows_becomes_smaller_and_says_so(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", hidden_size=64, intermediate_size=128)
    mixed = FolderJob(open_model(tmp_path / "model"), recipe("w4a16-g128")).plan
    assert {step.type for step in mixed.steps} == {"F16", "int4-g64", "int4-g128"}
    assert all("64 inputs do not divide into groups of 128" in s.exception for s in mixed.steps if s.type == "int4-g64")
    even = FolderJob(open_model(tmp_path / "model"), recipe("gptq-4bit-g128")).plan
    assert {step.type for step in even.steps} == {"F16", "int4-g64"}


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "unused")
    model.bfloat16().save_pretrained(tmp_path / "model")
    FolderJob(open_model(tmp_path / "model"), recipe("w4a16-g32")).write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = open_model(tmp_path / "out").tensors
    assert isinstance(tensors, QuantizedTensors)
    assert tensors.quantized("model.layers.0.mlp.up_proj.weight").grid == grid_named("int4-g32:bf16")


def test_an_existing_folder_is_replaced_on_demand_alone_and_never_one_of_another_kind(
    llama: Path, tmp_path: Path
) -> None:
    job = FolderJob(open_model(llama), recipe("w4a16-g32"))
    job.write(tmp_path / "out")
    with pytest.raises(OutputError, match="--force"):
        job.write(tmp_path / "out")
    FolderJob(open_model(llama), recipe("w8a16-g32")).write(tmp_path / "out", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(OutputError, match="holds other things"):
        job.write(tmp_path / "mine", overwrite=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mine", "out"]


def test_a_failure_leaves_nothing_behind(llama: Path, tmp_path: Path) -> None:
    job = FolderJob(open_model(llama), recipe("w4a16-g32", "feedback"))
    with pytest.raises(RecipeError, match="on text"):
        job.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", hidden_size=40, intermediate_size=40, num_attention_heads=2, head_dim=20)
    with pytest.raises(RecipeError, match="quantizes nothing here: 40 inputs do not divide"):
        FolderJob(open_model(tmp_path / "model"), recipe("w4a16-g128"))


def test_large_models_are_cut_into_shards(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whit.pipeline.folder.SHARD_BYTES", 40_000)
    job = FolderJob(open_model(llama), recipe("w4a16-g32"))
    job.write(tmp_path / "out")
    files = list((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("model*")) == job.n_bytes
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    mine = logits(load_module(open_model(tmp_path / "out")))
    assert (logits(theirs.eval()) - mine).norm() < 1e-4 * mine.norm()


def test_scales_of_a_whole_matrix(llama: Path, tmp_path: Path) -> None:
    FolderJob(open_model(llama), recipe("whit-int8-tensor")).write(tmp_path / "out")
    found = open_model(tmp_path / "out").tensors
    W = open_model(llama).tensors.read("model.layers.1.self_attn.k_proj.weight")
    assert (found.read("model.layers.1.self_attn.k_proj.weight") - W).abs().max() <= W.abs().max() / 127
