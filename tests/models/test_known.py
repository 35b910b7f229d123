"""Every table against its two truths: llama.cpp's runtime computes what transformers computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from llamacpp import llama_cpp_logits
from tiny import TINY, WINDOW, MemorySource, random_tokens, save_tiny, tiny_model, write_with_gguf
from whit.checkpoints.folder import open_folder, read_config
from whit.errors import ModelError
from whit.models.architecture import GGUFView, Part, gguf_view
from whit.models.known import ARCHITECTURES
from whit.models.known_changes import ReluScaled, relu_scale
from whit.models.known_rope import llama3_factors
from whit.models.model import Model

# llama.cpp computes GELU from a table in half precision, everything else in float32.
GELU = ("gemma", "gpt2", "gpt_neox")
TOLERANCE_F16, TOLERANCE_F32, TOLERANCE_GELU = 1e-2, 1e-5, 2e-3


def open_saved(folder: Path) -> Model:
    tensors, n_bytes = open_folder(folder)
    return Model(str(folder), read_config(folder), tensors, n_bytes)


def in_memory(model: PreTrainedModel, **changes: Any) -> Model:
    config = {**model.config.to_dict(), **changes}
    return Model("model", config, MemorySource(model.state_dict()), 0)


def distance(model: PreTrainedModel, view: GGUFView, path: Path, tokens: list[int], half: bool = False) -> float:
    """Largest difference of logits between llama.cpp and transformers, relative to the largest logit."""
    write_with_gguf(view, path, half)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    found = llama_cpp_logits(path, tokens)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
def test_llama_cpp_computes_what_transformers_computes(name: str, half: bool, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path / "model")
    found = distance(model, gguf_view(open_saved(tmp_path / "model")), tmp_path / "x.gguf", random_tokens(40), half)
    exact = TOLERANCE_GELU if name.startswith(GELU) else TOLERANCE_F32
    assert found < (TOLERANCE_F16 if half else exact)


def test_another_row_order_would_be_noticed(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    view = gguf_view(open_saved(tmp_path / "model"))
    on_disk = model.state_dict()["model.layers.0.self_attn.k_proj.weight"]
    tensors = tuple(
        replace(t, parts=(Part(t.shape, lambda: on_disk),)) if t.name == "blk.0.attn_k.weight" else t
        for t in view.tensors
    )
    assert distance(model, replace(view, tensors=tensors), tmp_path / "x.gguf", random_tokens(40)) > 0.1


def test_the_sequences_reach_beyond_gemmas_window() -> None:
    assert WINDOW < 40


def test_mistral_claims_no_context_beyond_its_window(tmp_path: Path) -> None:
    model = save_tiny("mistral", tmp_path / "model")
    view = gguf_view(open_saved(tmp_path / "model"))
    context = view.metadata["llama.context_length"]
    assert context == model.config.sliding_window == 64
    assert distance(model, view, tmp_path / "x.gguf", random_tokens(context)) < TOLERANCE_F32


def test_long_factors_are_used_beyond_the_original_context(tmp_path: Path) -> None:
    model = save_tiny("phi3-longrope", tmp_path / "model")
    view = gguf_view(open_saved(tmp_path / "model"))
    assert distance(model, view, tmp_path / "x.gguf", random_tokens(310)) < TOLERANCE_F32


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_fused_on_disk_are_accepted(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "model", save_original_format=False)
    names = open_saved(tmp_path / "model").tensors.names()
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    view = gguf_view(open_saved(tmp_path / "model"))
    assert distance(model, view, tmp_path / "x.gguf", random_tokens(40)) < TOLERANCE_F32


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_largest_gemmas_scale_queries_by_hidden_size(name: str, layers: int, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        name,
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=16,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "q_proj" in parameter_name or "k_proj" in parameter_name:
            parameter.data *= 20
    model.save_pretrained(tmp_path / "model")
    view = gguf_view(open_saved(tmp_path / "model"))
    assert distance(model, view, tmp_path / "x.gguf", random_tokens(20)) < TOLERANCE_GELU


@pytest.mark.parametrize("table", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_defaults_are_those_of_transformers(table: Any) -> None:
    config = AutoConfig.for_model(table.model_type).to_dict()
    facts = table.facts({})
    assert facts["tie_word_embeddings"] == config["tie_word_embeddings"]
    for key in table.keys:
        expected = config.get(key.config)
        assert facts[key.config] == expected or expected is None, key.config


@pytest.mark.parametrize("table", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_folder_without_optional_entries_equals_one_with_them(table: Any) -> None:
    config = AutoConfig.for_model(table.model_type).to_dict()
    assert table.dims(table.facts({})) == table.dims(table.facts(config))


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("llama-llama3-rope", ("rope_theta", "rope_scaling")),
        ("llama-yarn", ("rope_theta", "rope_scaling")),
        ("phi3-longrope", ("rope_theta", "rope_scaling")),
    ],
)
def test_old_and_new_style_of_rope_parameters_mean_the_same(name: str, old: tuple[str, str]) -> None:
    model = tiny_model(name)
    config = model.config.to_dict()
    rope = dict(config.pop("rope_parameters"))
    rope["type"] = rope.pop("rope_type")
    earlier = {**config, old[0]: rope.pop("rope_theta"), old[1]: rope}
    views = [
        gguf_view(Model("m", each, MemorySource(model.state_dict()), 0)) for each in (model.config.to_dict(), earlier)
    ]
    assert views[0].metadata == views[1].metadata
    assert [t.name for t in views[0].tensors] == [t.name for t in views[1].tensors]


def test_gemma3_in_the_old_style_means_the_same() -> None:
    model = tiny_model("gemma3-pattern")
    config = model.config.to_dict()
    earlier = {key: value for key, value in config.items() if key != "rope_parameters"}
    earlier |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    tensors = MemorySource(model.state_dict())
    assert gguf_view(Model("m", earlier, tensors, 0)).metadata == gguf_view(Model("m", config, tensors, 0)).metadata


def test_neox_in_the_old_style_means_the_same() -> None:
    model = tiny_model("gpt_neox")
    config = model.config.to_dict()
    earlier = {key: value for key, value in config.items() if key != "rope_parameters"}
    earlier |= {"rotary_pct": 0.25, "rotary_emb_base": 10000}
    tensors = MemorySource(model.state_dict())
    assert gguf_view(Model("m", earlier, tensors, 0)).metadata == gguf_view(Model("m", config, tensors, 0)).metadata


def test_llama3_factors_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / scaled, torch.tensor(llama3_factors(rope, 128)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("opt", {"do_layer_norm_before": False}, "OPT-350m"),
        ("opt", {"word_embed_proj_dim": 32}, "OPT-350m"),
        ("opt", {"activation_function": "gelu"}, "ReLU"),
        ("qwen3_moe", {"norm_topk_prob": False}, "sum to 1"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "every block"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ("llama", {"hidden_act": "relu"}, "hidden_act"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ("llama-yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}}, "beta_fast"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
        ("llama", {"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(name: str, change: dict[str, Any], word: str) -> None:
    with pytest.raises(ModelError, match=word):
        gguf_view(in_memory(tiny_model(name), **change))


def test_relu_scale_is_a_power_of_two_that_fits_in_float16() -> None:
    for largest in (0.01, 7.9, 8.0, 8.1, 100.0, 60000.0):
        k = relu_scale(torch.tensor([[largest, -0.5]]))
        assert np.log2(k) % 1 == 0
        assert torch.isfinite(torch.tensor(largest * k).half())
        assert k == 4096 or largest * k * 2 > 32768


def test_the_relu_trick_survives_large_weights(tmp_path: Path) -> None:
    model = tiny_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[3, 5] = 40.0
    model.save_pretrained(tmp_path / "model")
    view = gguf_view(open_saved(tmp_path / "model"))
    scales = next(t for t in view.tensors if t.name == "blk.0.ffn.act.scales")
    assert set(scales.parts[0].read().tolist()) == {512.0}
    assert distance(model, view, tmp_path / "x.gguf", random_tokens(20), half=True) < TOLERANCE_F16


def test_the_relu_trick_is_exact_in_the_stored_type() -> None:
    W = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    change = ReluScaled("w", "s")
    k = relu_scale(W)
    up = change.to_gguf(W, {}, lambda name: W)
    assert up.dtype == torch.bfloat16
    assert torch.equal(change.to_disk(up, {}, lambda name: torch.full((8,), k)), W)


def test_sliding_blocks_of_qwen_limit_the_context() -> None:
    model = tiny_model("qwen2")
    windowed = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, "layer_types": None}
    assert gguf_view(in_memory(model, **windowed)).metadata["qwen2.context_length"] == 32
    unused = {**windowed, "use_sliding_window": False}
    assert gguf_view(in_memory(model, **unused)).metadata["qwen2.context_length"] == 128
