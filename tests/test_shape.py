"""Dimensions and counts of parameters against published figures and transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from whit.errors import ModelError
from whit.memory import kv_cache_bytes
from whit.shape import KNOWN_SHAPES, count_parameters, plausible_shape, shape_from_config, widest_used_row

BILLION = 10**9


# ---- counting the parameters of a model

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": GPTNeoXConfig(**_SIZES),
    "opt": OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "gemma2": Gemma2Config(**{**_SIZES, "num_hidden_layers": 5}, head_dim=16, num_key_value_heads=2, sliding_window=24),
    "gemma3": Gemma3TextConfig(**{**_SIZES, "num_hidden_layers": 13}, head_dim=16, num_key_value_heads=1),
    "mistral": MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=40),
    "qwen2-sliding": Qwen2Config(
        **{**_SIZES, "num_hidden_layers": 5},
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=3,
    ),
    "qwen2": Qwen2Config(**_SIZES, num_key_value_heads=2),
    "qwen3_moe": Qwen3MoeConfig(
        **_SIZES, head_dim=16, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}  # fmt: skip
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@EVERY_CONFIG
def test_parameters_are_counted_as_transformers_counts_them(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}  # a tied head is in here twice
    assert count_parameters(shapes, config.tie_word_embeddings) == sum(p.numel() for p in model.parameters())


def test_masks_and_frequencies_of_old_checkpoints_are_not_parameters() -> None:
    shapes = {
        "h.0.attn.bias": (1, 1, 128, 128),
        "h.0.attn.masked_bias": (),
        "h.0.attn.c_attn.bias": (96,),
        "layers.0.rotary_emb.inv_freq": (16,),
    }
    assert count_parameters(shapes, tied=False) == 96


def test_the_head_of_an_untied_model_counts() -> None:
    shapes = {"model.embed_tokens.weight": (10, 4), "lm_head.weight": (10, 4)}
    assert (count_parameters(shapes, tied=False), count_parameters(shapes, tied=True)) == (80, 40)


def test_a_head_without_an_embedding_of_its_shape_counts_even_when_called_tied() -> None:
    assert count_parameters({"lm_head.weight": (10, 4), "other.weight": (3, 4)}, tied=True) == 52


def test_row_width_is_that_of_most_weights() -> None:
    shapes = {"norm": (1000,), "up": (30, 8), "down": (8, 30), "embed": (10, 8)}
    assert widest_used_row(shapes, tied=False) == 8
    assert widest_used_row({"norm": (1000,)}, tied=False) is None


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_known_shapes_hold_the_parameters_they_claim(name: str) -> None:
    n_parameters, shape = KNOWN_SHAPES[name]
    blocks = sum(rows * cols for rows, cols in shape.matrices()) + (2 * shape.layers + 1) * shape.hidden
    qkv_bias = shape.layers * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    embedding = shape.vocab * shape.hidden
    tied, untied, untied_with_biases = blocks + embedding, blocks + 2 * embedding, blocks + 2 * embedding + qkv_bias
    assert n_parameters in (tied, untied, untied_with_biases)


def test_the_plausible_shape_is_that_of_the_nearest_model() -> None:
    assert plausible_shape(8 * BILLION)[0] == "Llama 3.1 8B"
    assert plausible_shape(1)[0] == "SmolLM2 135M"
    assert plausible_shape(10**15)[0] == "Llama 3.1 405B"


# ---- from configurations


@EVERY_CONFIG
def test_shapes_are_read_from_configurations(config: PretrainedConfig) -> None:
    shape = shape_from_config(config.to_dict())
    heads = config.num_attention_heads
    assert (shape.layers, shape.hidden, shape.heads) == (config.num_hidden_layers, config.hidden_size, heads)
    assert shape.kv_heads == (getattr(config, "num_key_value_heads", None) or heads)
    assert shape.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // heads)
    assert shape.vocab == config.vocab_size
    assert shape.max_context == config.max_position_embeddings


@EVERY_CONFIG
def test_the_cache_has_the_size_that_transformers_fills(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    context = 100  # longer than every window but gemma3's 4096
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.ones(2, context, dtype=torch.long), use_cache=True).past_key_values
        # one more step trims the windows to what later steps can see
        cache = model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache, use_cache=True).past_key_values
    shape = shape_from_config(config.to_dict())
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    # transformers keeps one position less in a window: the newest token brings its own
    dropped = 2 * 2 * shape.sliding_layers * shape.kv_heads * shape.head_dim if shape.window <= context else 0
    assert kv_cache_bytes(shape, context + 1, batch=2, bits=8) == held + dropped


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sliding_window": 4096, "model_type": "gemma2"}, (5, 4096)),
        ({"sliding_window": 512, "model_type": "gemma3_text"}, (9, 512)),
        ({"sliding_window": 512, "sliding_window_pattern": 4}, (8, 512)),
        ({"sliding_window": 4096}, (10, 4096)),
        ({"sliding_window": None}, (0, 0)),
        ({"sliding_window": 4096, "use_sliding_window": False}, (0, 0)),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 7}, (3, 4096)),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 5}, (5, 8)),
    ],
)
def test_windows_are_read_in_every_spelling(config: dict[str, Any], expected: tuple[int, int]) -> None:
    sizes = {"num_hidden_layers": 10, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    shape = shape_from_config(sizes | config)
    assert (shape.sliding_layers, shape.window) == expected


def test_a_nested_text_configuration_is_found() -> None:
    sizes = {"num_hidden_layers": 10, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    assert shape_from_config({"model_type": "gemma3", "text_config": sizes}).layers == 10


@pytest.mark.parametrize("value", ["32", -1, 0, 1.5, True])
def test_a_configuration_that_makes_no_sense_is_refused(value: object) -> None:
    sizes = {"num_hidden_layers": value, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    with pytest.raises(ModelError, match="num_hidden_layers"):
        shape_from_config(sizes)


def test_a_configuration_without_dimensions_says_what_is_missing() -> None:
    with pytest.raises(ModelError, match=r"num_hidden_layers, hidden_size, num_attention_heads, vocab_size"):
        shape_from_config({})
