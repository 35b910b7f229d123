"""The architectures Whit knows, one table each.

Names on disk are those that transformers 5 writes; names and keys in GGUF are those that llama.cpp reads.
Sources: transformers' configuration and modeling files, llama.cpp's src/models and gguf-py's constants.
"""

from __future__ import annotations

from dataclasses import replace

from whit.models.known_changes import (
    Change,
    PlusOne,
    QKVByHead,
    ReluScaled,
    ReluScales,
    RotaryRows,
    Same,
    SkipRows,
    Transposed,
)
from whit.models.known_table import Architecture, Facts, Fused, Key, Stored, Trait, Weight
from whit.models.known_traits import (
    SOURCE,
    Always,
    ClampedWindow,
    EqualTo,
    Flag,
    HeadSize,
    LocalRope,
    Marked,
    QueryScale,
    Required,
    Rope,
    WindowPattern,
)

PLAIN_SCALINGS = ("linear", "yarn")
MASKS = (r"\.rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")
ONE_GRAPH = "llama.cpp's graph for this architecture has only one activation"


def _heads(facts: Facts) -> int:
    return int(facts["num_attention_heads"])


def _head_dim(facts: Facts) -> int:
    return int(facts["hidden_size"]) // max(1, int(facts["num_attention_heads"]))


def _sizes(
    vocab: int, hidden: int, ff: int, layers: int, heads: int, context: int, ff_name: str = "intermediate_size"
) -> tuple[Key, ...]:
    return (
        Key("vocab_size", vocab, "vocab_size", "vocab"),
        Key("max_position_embeddings", context, "context_length", "context"),
        Key("hidden_size", hidden, "embedding_length", "hidden"),
        Key("num_hidden_layers", layers, "block_count", "layers"),
        Key(ff_name, ff, "feed_forward_length", "ff"),
        Key("num_attention_heads", heads, "attention.head_count", "heads"),
    )


def _kv_heads(default: int | None) -> Key:
    return Key("num_key_value_heads", default, "attention.head_count_kv", "kv_heads", if_none=_heads)


def _free_head_dim(default: int | None) -> Key:
    return Key("head_dim", default, size="head_dim", if_none=_head_dim)


def _rms(default: float) -> Key:
    return Key("rms_norm_eps", default, "attention.layer_norm_rms_epsilon", kind=float)


def _must(entry: str, value: object, why: str) -> Required:
    return Required(entry, value, (value, None) if value in (False, None) else (value,), value, why)


def _activation(entry: str, *allowed: str) -> Required:
    return Required(entry, allowed[0], allowed, allowed[0], ONE_GRAPH)


# Weights that many families share. `L` is one block's prefix on disk.
L = "model.layers.{i}"
EMBEDDING = Weight("token_embd.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"))
HEAD = Weight("output.weight", ("lm_head.weight",), ("vocab", "hidden"))


def _final_norm(change: Change) -> Weight:
    return Weight("output_norm.weight", ("model.norm.weight",), ("hidden",), change)


def _norm(gguf: str, disk: str, change: Change, size: str = "hidden") -> Weight:
    return Weight(f"blk.{{i}}.{gguf}.weight", (f"{L}.{disk}.weight",), (size,), change)


def _attention(q: Change, k: Change, kind: str = "weight", when: str = "", out: bool = True) -> tuple[Weight, ...]:
    cols = ("hidden",) if kind == "weight" else ()
    qkv = (
        Weight(f"blk.{{i}}.attn_q.{kind}", (f"{L}.self_attn.q_proj.{kind}",), ("q", *cols), q, when),
        Weight(f"blk.{{i}}.attn_k.{kind}", (f"{L}.self_attn.k_proj.{kind}",), ("kv", *cols), k, when),
        Weight(f"blk.{{i}}.attn_v.{kind}", (f"{L}.self_attn.v_proj.{kind}",), ("kv", *cols), when=when),
    )
    shape = ("hidden", "q") if kind == "weight" else ("hidden",)
    return (
        (*qkv, Weight(f"blk.{{i}}.attn_output.{kind}", (f"{L}.self_attn.o_proj.{kind}",), shape, when=when))
        if out
        else qkv
    )


def _gated(kind: str = "weight", when: str = "") -> tuple[Weight, ...]:
    cols = ("hidden",) if kind == "weight" else ()
    down = ("hidden", "ff") if kind == "weight" else ("hidden",)
    return (
        Weight(f"blk.{{i}}.ffn_gate.{kind}", (f"{L}.mlp.gate_proj.{kind}",), ("ff", *cols), when=when),
        Weight(f"blk.{{i}}.ffn_up.{kind}", (f"{L}.mlp.up_proj.{kind}",), ("ff", *cols), when=when),
        Weight(f"blk.{{i}}.ffn_down.{kind}", (f"{L}.mlp.down_proj.{kind}",), down, when=when),
    )


def _experts(router: str, gate: str, up: str, down: str, width: str) -> tuple[Weight, ...]:
    fused = f"{L}.mlp.experts.gate_up_proj"
    up_shape, down_shape = ("experts", width, "hidden"), ("experts", "hidden", width)
    return (
        Weight("blk.{i}.ffn_gate_inp.weight", (f"{L}.{router}.weight",), ("experts", "hidden")),
        Weight("blk.{i}.ffn_gate_exps.weight", (f"{L}.{gate}.weight",), up_shape, fused=Fused(fused, 0, 2)),
        Weight("blk.{i}.ffn_up_exps.weight", (f"{L}.{up}.weight",), up_shape, fused=Fused(fused, 1, 2)),
        Weight(
            "blk.{i}.ffn_down_exps.weight",
            (f"{L}.{down}.weight",),
            down_shape,
            fused=Fused(f"{L}.mlp.experts.down_proj"),
        ),
    )


QK_NORMS = (
    _norm("attn_q_norm", "self_attn.q_norm", Same(), "head_dim"),
    _norm("attn_k_norm", "self_attn.k_norm", Same(), "head_dim"),
)
TWO_NORMS = (
    _norm("attn_norm", "input_layernorm", Same()),
    _norm("ffn_norm", "post_attention_layernorm", Same()),
)
ROTARY = (RotaryRows("heads"), RotaryRows("kv_heads"))
BARE_MODEL = ((r"^(?=layers\.|embed_tokens\.|norm\.)", "model."),)  # saved without its head

LLAMA = Architecture(
    model_type="llama",
    graph="llama",
    class_name="LlamaForCausalLM",
    tied=False,
    keys=(*_sizes(32000, 4096, 11008, 32, 32, 2048), _kv_heads(None), _free_head_dim(None), _rms(1e-6)),
    traits=(
        HeadSize(),
        Rope((*PLAIN_SCALINGS, "llama3", "longrope")),
        _activation("hidden_act", "silu"),
        Flag("attention_bias", False, "blk.0.attn_q.bias"),
        Flag("mlp_bias", False, "blk.0.ffn_up.bias"),
    ),
    weights=(
        EMBEDDING,
        *TWO_NORMS,
        *_attention(*ROTARY),
        *_attention(*ROTARY, kind="bias", when="attention_bias"),
        *_gated(),
        *_gated("bias", when="mlp_bias"),
        _final_norm(Same()),
        HEAD,
    ),
    renames=BARE_MODEL,
    ignored=MASKS,
)


def _is_mixture(stored: Stored) -> bool:
    return bool(stored.get("expert_count", 0))


MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    class_name="MistralForCausalLM",
    keys=(*_sizes(32000, 4096, 14336, 32, 32, 131072), _kv_heads(8), _free_head_dim(None), _rms(1e-6)),
    traits=(
        HeadSize(),
        Rope((*PLAIN_SCALINGS, "llama3", "longrope")),
        ClampedWindow(4096),
        _activation("hidden_act", "silu"),
    ),
    weights=(EMBEDDING, *TWO_NORMS, *_attention(*ROTARY), *_gated(), _final_norm(Same()), HEAD),
    recognises=lambda stored: not _is_mixture(stored) and bool(stored.get("attention.sliding_window", 0)),
)

EXPERT_KEYS = (
    Key("num_local_experts", 8, "expert_count", "experts", aliases=("num_experts",)),
    Key("num_experts_per_tok", 2, "expert_used_count", "experts_used"),
)

MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    keys=(
        *_sizes(32000, 4096, 14336, 32, 32, 131072),
        _kv_heads(8),
        _free_head_dim(None),
        _rms(1e-5),
        *EXPERT_KEYS,
    ),
    traits=(
        HeadSize(),
        Rope((*PLAIN_SCALINGS, "llama3", "longrope"), theta=1_000_000.0),
        ClampedWindow(),
        _activation("hidden_act", "silu"),
    ),
    weights=(
        EMBEDDING,
        *TWO_NORMS,
        *_attention(*ROTARY),
        *_experts(
            "block_sparse_moe.gate",
            *(f"block_sparse_moe.experts.{{e}}.{name}" for name in ("w1", "w3", "w2")),
            width="ff",
        ),
        _final_norm(Same()),
        HEAD,
    ),
    renames=(*BARE_MODEL, (r"\.mlp\.gate\.", ".block_sparse_moe.gate.")),
    recognises=_is_mixture,
)

QWEN2 = Architecture(
    model_type="qwen2",
    graph="qwen2",
    class_name="Qwen2ForCausalLM",
    tied=False,
    keys=(*_sizes(151936, 4096, 22016, 32, 32, 32768), _kv_heads(32), _rms(1e-6)),
    traits=(Rope(PLAIN_SCALINGS), ClampedWindow(4096, switched=True), _activation("hidden_act", "silu")),
    weights=(
        EMBEDDING,
        *TWO_NORMS,
        *_attention(Same(), Same()),
        *_attention(Same(), Same(), kind="bias", out=False),
        *_gated(),
        _final_norm(Same()),
        HEAD,
    ),
    renames=BARE_MODEL,
    ignored=MASKS,
)

NO_BIAS = _must("attention_bias", False, "llama.cpp's graph has no bias there")

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    graph="qwen3",
    class_name="Qwen3ForCausalLM",
    keys=(*QWEN2.keys, _free_head_dim(128)),
    traits=(HeadSize(), *QWEN2.traits, NO_BIAS),
    weights=(EMBEDDING, *TWO_NORMS, *_attention(Same(), Same()), *QK_NORMS, *_gated(), _final_norm(Same()), HEAD),
)

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    graph="qwen3moe",
    class_name="Qwen3MoeForCausalLM",
    keys=(
        *_sizes(151936, 2048, 6144, 24, 32, 32768),
        _kv_heads(4),
        _free_head_dim(None),
        _rms(1e-6),
        Key("moe_intermediate_size", 768, "expert_feed_forward_length", "expert_ff"),
        Key("num_experts", 128, "expert_count", "experts", aliases=("num_local_experts",)),
        Key("num_experts_per_tok", 8, "expert_used_count", "experts_used"),
    ),
    traits=(
        *QWEN3.traits,
        Required("norm_topk_prob", False, (True,), True, "llama.cpp always makes the chosen experts' weights sum to 1"),
        _must("decoder_sparse_step", 1, "llama.cpp's graph has experts in every block"),
        Required("mlp_only_layers", None, ([], None), [], "llama.cpp's graph has experts in every block"),
    ),
    weights=(
        EMBEDDING,
        *TWO_NORMS,
        *_attention(Same(), Same()),
        *QK_NORMS,
        *_experts(
            "mlp.gate",
            *(f"mlp.experts.{{e}}.{name}_proj" for name in ("gate", "up", "down")),
            width="expert_ff",
        ),
        _final_norm(Same()),
        HEAD,
    ),
)

GEMMA_NORMS = (
    _norm("attn_norm", "input_layernorm", PlusOne()),
    _norm("post_attention_norm", "post_attention_layernorm", PlusOne()),
    _norm("ffn_norm", "pre_feedforward_layernorm", PlusOne()),
    _norm("post_ffw_norm", "post_feedforward_layernorm", PlusOne()),
)
GEMMA_TRAITS: tuple[Trait, ...] = (
    HeadSize(),
    _activation("hidden_activation", "gelu_pytorch_tanh", "gelu_new"),
    NO_BIAS,
    _must("use_bidirectional_attention", False, "a GGUF language model only looks back"),
)

GEMMA2 = Architecture(
    model_type="gemma2",
    graph="gemma2",
    class_name="Gemma2ForCausalLM",
    tied=True,
    keys=(
        *_sizes(256000, 2304, 9216, 26, 8, 8192),
        _kv_heads(4),
        _free_head_dim(256),
        _rms(1e-6),
        Key("attn_logit_softcapping", 50.0, "attn_logit_softcapping", kind=float),
        Key("final_logit_softcapping", 30.0, "final_logit_softcapping", kind=float),
    ),
    traits=(*GEMMA_TRAITS, Rope(("linear",)), WindowPattern(2), QueryScale(layers_of_27b=46)),
    weights=(EMBEDDING, *GEMMA_NORMS, *_attention(Same(), Same()), *_gated(), _final_norm(PlusOne()), HEAD),
    head="never",
    renames=BARE_MODEL,
    ignored=MASKS,
)

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    graph="gemma3",
    class_name="Gemma3ForCausalLM",
    keys=(
        *_sizes(262208, 2304, 9216, 26, 8, 131072),
        _kv_heads(4),
        _free_head_dim(256),
        _rms(1e-6),
        Key("final_logit_softcapping", None, "final_logit_softcapping", kind=float, optional=True),
    ),
    traits=(
        *GEMMA_TRAITS,
        _must("attn_logit_softcapping", None, "llama.cpp's graph caps no attention scores"),
        LocalRope(),
        WindowPattern(6),
        QueryScale(layers_of_27b=62),
    ),
    weights=(
        EMBEDDING,
        *GEMMA_NORMS,
        *_attention(Same(), Same()),
        *(replace(norm, change=PlusOne()) for norm in QK_NORMS),
        *_gated(),
        _final_norm(PlusOne()),
        HEAD,
    ),
    head="optional",
)

PHI3 = Architecture(
    model_type="phi3",
    graph="phi3",
    class_name="Phi3ForCausalLM",
    tied=False,
    keys=(*_sizes(32064, 3072, 8192, 32, 32, 4096), _kv_heads(None), _rms(1e-5)),
    traits=(Rope(("longrope",), partial=1.0, original=4096), ClampedWindow(), _activation("hidden_act", "silu")),
    weights=(
        EMBEDDING,
        *TWO_NORMS,
        Weight("blk.{i}.attn_qkv.weight", (f"{L}.self_attn.qkv_proj.weight",), ("q+kv+kv", "hidden")),
        Weight("blk.{i}.attn_output.weight", (f"{L}.self_attn.o_proj.weight",), ("hidden", "q")),
        Weight("blk.{i}.ffn_up.weight", (f"{L}.mlp.gate_up_proj.weight",), ("ff+ff", "hidden")),
        Weight("blk.{i}.ffn_down.weight", (f"{L}.mlp.down_proj.weight",), ("hidden", "ff")),
        _final_norm(Same()),
        HEAD,
    ),
    renames=BARE_MODEL,
    ignored=MASKS,
)


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
        _activation("activation_function", "gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast"),
        _must("scale_attn_weights", True, "llama.cpp's graph scales attention scores"),
        _must("scale_attn_by_inverse_layer_idx", False, "llama.cpp's graph scales attention scores by width only"),
        _must("add_cross_attention", False, "llama.cpp's graph has no encoder"),
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
        *_sizes(50432, 6144, 24576, 44, 64, 2048),
        Key("layer_norm_eps", 1e-5, "attention.layer_norm_epsilon", kind=float),
        Key("use_parallel_residual", True, "use_parallel_residual", kind=bool),
    ),
    traits=(
        Rope(PLAIN_SCALINGS, theta_name="rotary_emb_base", partial=0.25, partial_name="rotary_pct"),
        _activation("hidden_act", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        _must("attention_bias", True, "llama.cpp's graph needs biases there"),
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
RELU = ReluScaled(weight=f"{D}.fc1.weight", scales="blk.{i}.ffn_act.scales")

# llama.cpp has no graph for OPT. MPT's computes the same once ALiBi is off, positions are given and ReLU is
# written as GELU of large numbers.
OPT = Architecture(
    model_type="opt",
    graph="mpt",
    class_name="OPTForCausalLM",
    tied=True,
    keys=_sizes(50272, 768, 3072, 12, 12, 2048, ff_name="ffn_dim"),
    traits=(
        Marked("opt"),
        Always({"attention.layer_norm_epsilon": 1e-5, "attention.max_alibi_bias": 0.0}),
        _must("do_layer_norm_before", True, "llama.cpp has no graph that normalizes after each layer (OPT-350m)"),
        EqualTo("word_embed_proj_dim", "hidden_size", "llama.cpp has no graph that projects embeddings (OPT-350m)"),
        _must("_remove_final_layer_norm", False, "llama.cpp's graph has a final norm"),
        _must("layer_norm_elementwise_affine", True, "llama.cpp's graph needs norm weights"),
        _must("activation_function", "relu", "only ReLU can be expressed by llama.cpp's graph"),
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
        Weight("blk.{i}.ffn_act.scales", (f"{D}.fc1.weight",), ("ff",), ReluScales(), derived=True),
        Weight("blk.{i}.ffn_down.weight", (f"{D}.fc2.weight",), ("hidden", "ff")),
        Weight("blk.{i}.ffn_down.bias", (f"{D}.fc2.bias",), ("hidden",), when="enable_bias"),
        *_both("output_norm", "model.decoder.final_layer_norm", ("hidden",)),
        HEAD,
    ),
    renames=((r"^(?=decoder\.)", "model."),),
    ignored=MASKS,
    recognises=lambda stored: stored.get(SOURCE) == "opt",
)

# The order decides between architectures that share a graph: the most particular first.
ARCHITECTURES: dict[str, Architecture] = {
    table.model_type: table
    for table in (MIXTRAL, MISTRAL, LLAMA, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, PHI3, GPT2, GPT_NEOX, OPT)
}

# Configurations that look like a known one but hold more than a language model.
REFUSED: dict[str, str] = {
    "gemma3": "This is the multimodal Gemma 3. Whit reads its language model alone: export it as gemma3_text first.",
}
