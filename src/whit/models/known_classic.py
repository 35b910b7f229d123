"""GPT-2, GPT-NeoX and OPT: layer norms with biases, a feed-forward network without a gate.

Names on disk are those that transformers 5 writes; names and keys in GGUF are those that llama.cpp reads.
Sources: transformers' configuration and modeling files, llama.cpp's src/models.
"""

from __future__ import annotations

from whit.models.known_changes import Change, QKVByHead, ReluScaled, ReluScales, Same, SkipRows, Transposed
from whit.models.known_rope import Rope
from whit.models.known_shared import HEAD, MASKS, PLAIN_SCALINGS, activation, must, sizes
from whit.models.known_table import Architecture, Key, Weight
from whit.models.known_traits import SOURCE, Always, EqualTo, Flag, Marked


def _both(
    gguf: str, disk: str, shape: tuple[str, ...], change: Change | None = None, bias_change: Change | None = None
) -> tuple[Weight, Weight]:
    """A matrix (or norm) and its bias."""
    weight = Weight(f"{gguf}.weight", (f"{disk}.weight",), shape, change or Same())
    return weight, Weight(f"{gguf}.bias", (f"{disk}.bias",), shape[:1], bias_change or Same())


GPT2 = Architecture(
    model_type="gpt2",
    graph="gpt2",
    class_name="GPT2LMHeadModel",
    tied=True,
    keys=(
        Key("vocab_size", 50257, "vocab_size", "vocab"),
        Key("n_positions", 1024, "context_length", "context", aliases=("max_position_embeddings",)),
        Key("n_embd", 768, "embedding_length", "hidden", aliases=("hidden_size",)),
        Key("n_layer", 12, "block_count", "layers", aliases=("num_hidden_layers",)),
        Key("n_inner", None, "feed_forward_length", "ff", if_none=lambda facts: 4 * facts["n_embd"]),
        Key("n_head", 12, "attention.head_count", "heads", aliases=("num_attention_heads",)),
        Key("layer_norm_epsilon", 1e-5, "attention.layer_norm_epsilon", kind=float),
    ),
    traits=(
        activation("activation_function", "gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast"),
        must("scale_attn_weights", True, "llama.cpp's graph scales attention scores"),
        must("scale_attn_by_inverse_layer_idx", False, "llama.cpp's graph scales attention scores by width only"),
        must("add_cross_attention", False, "llama.cpp's graph has no encoder"),
    ),
    weights=(
        Weight("token_embd.weight", ("transformer.wte.weight",), ("vocab", "hidden")),
        Weight("position_embd.weight", ("transformer.wpe.weight",), ("context", "hidden")),
        *_both("blk.{i}.attn_norm", "transformer.h.{i}.ln_1", ("hidden",)),
        *_both("blk.{i}.attn_qkv", "transformer.h.{i}.attn.c_attn", ("q+kv+kv", "hidden"), Transposed()),
        *_both("blk.{i}.attn_output", "transformer.h.{i}.attn.c_proj", ("hidden", "q"), Transposed()),
        *_both("blk.{i}.ffn_norm", "transformer.h.{i}.ln_2", ("hidden",)),
        *_both("blk.{i}.ffn_up", "transformer.h.{i}.mlp.c_fc", ("ff", "hidden"), Transposed()),
        *_both("blk.{i}.ffn_down", "transformer.h.{i}.mlp.c_proj", ("hidden", "ff"), Transposed()),
        *_both("output_norm", "transformer.ln_f", ("hidden",)),
        HEAD,
    ),
    renames=((r"^(?=wte\.|wpe\.|h\.|ln_f\.)", "transformer."),),
    ignored=MASKS,
)

N = "gpt_neox.layers.{i}"
GPT_NEOX = Architecture(
    model_type="gpt_neox",
    graph="gptneox",
    class_name="GPTNeoXForCausalLM",
    tied=False,
    keys=(
        *sizes(50432, 6144, 24576, 44, 64, 2048),
        Key("layer_norm_eps", 1e-5, "attention.layer_norm_epsilon", kind=float),
        Key("use_parallel_residual", True, "use_parallel_residual", kind=bool),
    ),
    traits=(
        Rope(PLAIN_SCALINGS, theta_name="rotary_emb_base", partial=0.25, partial_name="rotary_pct"),
        activation("hidden_act", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        must("attention_bias", True, "llama.cpp's graph needs biases there"),
    ),
    weights=(
        Weight("token_embd.weight", ("gpt_neox.embed_in.weight",), ("vocab", "hidden")),
        *_both("blk.{i}.attn_norm", f"{N}.input_layernorm", ("hidden",)),
        *_both("blk.{i}.attn_qkv", f"{N}.attention.query_key_value", ("q+kv+kv", "hidden"), QKVByHead(), QKVByHead()),
        *_both("blk.{i}.attn_output", f"{N}.attention.dense", ("hidden", "q")),
        *_both("blk.{i}.ffn_norm", f"{N}.post_attention_layernorm", ("hidden",)),
        *_both("blk.{i}.ffn_up", f"{N}.mlp.dense_h_to_4h", ("ff", "hidden")),
        *_both("blk.{i}.ffn_down", f"{N}.mlp.dense_4h_to_h", ("hidden", "ff")),
        *_both("output_norm", "gpt_neox.final_layer_norm", ("hidden",)),
        Weight("output.weight", ("embed_out.weight",), ("vocab", "hidden")),
    ),
    head="required",
    renames=((r"^(?=layers\.|embed_in\.|final_layer_norm\.)", "gpt_neox."), (r"^lm_head\.", "embed_out.")),
    ignored=MASKS,
)

D = "model.decoder.layers.{i}"
QKV = ("q_proj", "k_proj", "v_proj")
RELU = ReluScaled(weight=f"{D}.fc1.weight", scales="blk.{i}.ffn.act.scales")

# llama.cpp has no graph for OPT. MPT's computes the same once ALiBi is off, positions are given and ReLU is
# written as GELU of large numbers.
OPT = Architecture(
    model_type="opt",
    graph="mpt",
    class_name="OPTForCausalLM",
    tied=True,
    keys=sizes(50272, 768, 3072, 12, 12, 2048, ff_name="ffn_dim"),
    traits=(
        Marked("opt"),
        Always({"attention.layer_norm_epsilon": 1e-5, "attention.max_alibi_bias": 0.0}),
        must("do_layer_norm_before", True, "llama.cpp has no graph that normalizes after each layer (OPT-350m)"),
        EqualTo("word_embed_proj_dim", "hidden_size", "llama.cpp has no graph that projects embeddings (OPT-350m)"),
        must("_remove_final_layer_norm", False, "llama.cpp's graph has a final norm"),
        must("layer_norm_elementwise_affine", True, "llama.cpp's graph needs norm weights"),
        must("activation_function", "relu", "only ReLU can be expressed by llama.cpp's graph"),
        Flag("enable_bias", True, "blk.0.attn_qkv.bias"),
    ),
    weights=(
        Weight("token_embd.weight", ("model.decoder.embed_tokens.weight",), ("vocab", "hidden")),
        Weight("position_embd.weight", ("model.decoder.embed_positions.weight",), ("context", "hidden"), SkipRows(2)),
        *_both("blk.{i}.attn_norm", f"{D}.self_attn_layer_norm", ("hidden",)),
        Weight("blk.{i}.attn_qkv.weight", tuple(f"{D}.self_attn.{name}.weight" for name in QKV), ("q+kv+kv", "hidden")),
        Weight(
            "blk.{i}.attn_qkv.bias",
            tuple(f"{D}.self_attn.{name}.bias" for name in QKV),
            ("q+kv+kv",),
            when="enable_bias",
        ),
        Weight("blk.{i}.attn_output.weight", (f"{D}.self_attn.out_proj.weight",), ("hidden", "q")),
        Weight("blk.{i}.attn_output.bias", (f"{D}.self_attn.out_proj.bias",), ("hidden",), when="enable_bias"),
        *_both("blk.{i}.ffn_norm", f"{D}.final_layer_norm", ("hidden",)),
        Weight("blk.{i}.ffn_up.weight", (f"{D}.fc1.weight",), ("ff", "hidden"), RELU),
        Weight("blk.{i}.ffn_up.bias", (f"{D}.fc1.bias",), ("ff",), RELU, when="enable_bias"),
        Weight("blk.{i}.ffn.act.scales", (f"{D}.fc1.weight",), ("ff",), ReluScales(), derived=True),
        Weight("blk.{i}.ffn_down.weight", (f"{D}.fc2.weight",), ("hidden", "ff")),
        Weight("blk.{i}.ffn_down.bias", (f"{D}.fc2.bias",), ("hidden",), when="enable_bias"),
        *_both("output_norm", "model.decoder.final_layer_norm", ("hidden",)),
        HEAD,
    ),
    renames=((r"^(?=decoder\.)", "model."),),
    ignored=MASKS,
    recognises=lambda stored: stored.get(SOURCE) == "opt",
)
