"""Llama and its relatives: RMS norms, rotary positions, a gated feed-forward network or experts.

Names on disk are those that transformers 5 writes; names and keys in GGUF are those that llama.cpp reads.
Sources: transformers' configuration and modeling files, llama.cpp's src/models.
"""

from __future__ import annotations

from dataclasses import replace

from whit.models.known_changes import Change, PlusOne, RotaryRows, Same
from whit.models.known_rope import LocalRope, Rope
from whit.models.known_shared import HEAD, MASKS, PLAIN_SCALINGS, activation, must, sizes
from whit.models.known_table import Architecture, Facts, Fused, Key, Stored, Trait, Weight
from whit.models.known_traits import ClampedWindow, Flag, HeadSize, QueryScale, Required, WindowPattern


def _heads(facts: Facts) -> int:
    return int(facts["num_attention_heads"])


def _head_dim(facts: Facts) -> int:
    return int(facts["hidden_size"]) // max(1, int(facts["num_attention_heads"]))


def kv_heads(default: int | None) -> Key:
    """Key and value heads; as many as query heads when nothing is said."""
    return Key("num_key_value_heads", default, "attention.head_count_kv", "kv_heads", if_none=_heads)


def free_head_dim(default: int | None) -> Key:
    """Width of a head, where it need not be hidden / heads."""
    return Key("head_dim", default, size="head_dim", if_none=_head_dim)


def rms(default: float) -> Key:
    """What is added to the mean square in norms."""
    return Key("rms_norm_eps", default, "attention.layer_norm_rms_epsilon", kind=float)


# Weights that many families share. `L` is one block's prefix on disk.
L = "model.layers.{i}"
EMBEDDING = Weight("token_embd.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"))


def final_norm(change: Change) -> Weight:
    """The norm before the head."""
    return Weight("output_norm.weight", ("model.norm.weight",), ("hidden",), change)


def block_norm(gguf: str, disk: str, change: Change, size: str = "hidden") -> Weight:
    """A norm in every block."""
    return Weight(f"blk.{{i}}.{gguf}.weight", (f"{L}.{disk}.weight",), (size,), change)


def attention(q: Change, k: Change, kind: str = "weight", when: str = "", out: bool = True) -> tuple[Weight, ...]:
    """Queries, keys, values and, with `out`, the output: weights or biases (kind)."""
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


def _experts(width: str, router: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
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
    block_norm("attn_q_norm", "self_attn.q_norm", Same(), "head_dim"),
    block_norm("attn_k_norm", "self_attn.k_norm", Same(), "head_dim"),
)
TWO_NORMS = (
    block_norm("attn_norm", "input_layernorm", Same()),
    block_norm("ffn_norm", "post_attention_layernorm", Same()),
)
ROTARY = (RotaryRows("heads"), RotaryRows("kv_heads"))
BARE_MODEL = ((r"^(?=layers\.|embed_tokens\.|norm\.)", "model."),)  # saved without its head

LLAMA = Architecture(
    model_type="llama",
    graph="llama",
    class_name="LlamaForCausalLM",
    tied=False,
    keys=(*sizes(32000, 4096, 11008, 32, 32, 2048), kv_heads(None), free_head_dim(None), rms(1e-6)),
    traits=(
        HeadSize(),
        Rope((*PLAIN_SCALINGS, "llama3", "longrope")),
        activation("hidden_act", "silu"),
        Flag("attention_bias", False, "blk.0.attn_q.bias"),
        Flag("mlp_bias", False, "blk.0.ffn_up.bias"),
    ),
    weights=(
        EMBEDDING,
        *TWO_NORMS,
        *attention(*ROTARY),
        *attention(*ROTARY, kind="bias", when="attention_bias"),
        *_gated(),
        *_gated("bias", when="mlp_bias"),
        final_norm(Same()),
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
    keys=(*sizes(32000, 4096, 14336, 32, 32, 131072), kv_heads(8), free_head_dim(None), rms(1e-6)),
    traits=(
        HeadSize(),
        Rope((*PLAIN_SCALINGS, "llama3", "longrope")),
        ClampedWindow(4096),
        activation("hidden_act", "silu"),
    ),
    weights=(EMBEDDING, *TWO_NORMS, *attention(*ROTARY), *_gated(), final_norm(Same()), HEAD),
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
        *sizes(32000, 4096, 14336, 32, 32, 131072),
        kv_heads(8),
        free_head_dim(None),
        rms(1e-5),
        *EXPERT_KEYS,
    ),
    traits=(
        HeadSize(),
        Rope((*PLAIN_SCALINGS, "llama3", "longrope"), theta=1_000_000.0),
        ClampedWindow(),
        activation("hidden_act", "silu"),
    ),
    weights=(
        EMBEDDING,
        *TWO_NORMS,
        *attention(*ROTARY),
        *_experts(
            "ff",
            "block_sparse_moe.gate",
            *(f"block_sparse_moe.experts.{{e}}.{name}" for name in ("w1", "w3", "w2")),
        ),
        final_norm(Same()),
        HEAD,
    ),
    renames=(*BARE_MODEL, (r"\.mlp\.gate\.", ".block_sparse_moe.gate.")),
    module_names=((r"\.block_sparse_moe\.gate\.", ".mlp.gate."),),
    recognises=_is_mixture,
)

QWEN2 = Architecture(
    model_type="qwen2",
    graph="qwen2",
    class_name="Qwen2ForCausalLM",
    tied=False,
    keys=(*sizes(151936, 4096, 22016, 32, 32, 32768), kv_heads(32), rms(1e-6)),
    traits=(Rope(PLAIN_SCALINGS), ClampedWindow(4096, switched=True), activation("hidden_act", "silu")),
    weights=(
        EMBEDDING,
        *TWO_NORMS,
        *attention(Same(), Same()),
        *attention(Same(), Same(), kind="bias", out=False),
        *_gated(),
        final_norm(Same()),
        HEAD,
    ),
    renames=BARE_MODEL,
    ignored=MASKS,
)

NO_BIAS = must("attention_bias", False, "llama.cpp's graph has no bias there")

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    graph="qwen3",
    class_name="Qwen3ForCausalLM",
    keys=(*QWEN2.keys, free_head_dim(128)),
    traits=(HeadSize(), *QWEN2.traits, NO_BIAS),
    weights=(EMBEDDING, *TWO_NORMS, *attention(Same(), Same()), *QK_NORMS, *_gated(), final_norm(Same()), HEAD),
)

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    graph="qwen3moe",
    class_name="Qwen3MoeForCausalLM",
    keys=(
        *sizes(151936, 2048, 6144, 24, 32, 32768),
        kv_heads(4),
        free_head_dim(None),
        rms(1e-6),
        Key("moe_intermediate_size", 768, "expert_feed_forward_length", "expert_ff"),
        Key("num_experts", 128, "expert_count", "experts", aliases=("num_local_experts",)),
        Key("num_experts_per_tok", 8, "expert_used_count", "experts_used"),
    ),
    traits=(
        *QWEN3.traits,
        Required("norm_topk_prob", False, (True,), True, "llama.cpp always makes the chosen experts' weights sum to 1"),
        must("decoder_sparse_step", 1, "llama.cpp's graph has experts in every block"),
        Required("mlp_only_layers", None, ([], None), [], "llama.cpp's graph has experts in every block"),
    ),
    weights=(
        EMBEDDING,
        *TWO_NORMS,
        *attention(Same(), Same()),
        *QK_NORMS,
        *_experts(
            "expert_ff",
            "mlp.gate",
            *(f"mlp.experts.{{e}}.{name}_proj" for name in ("gate", "up", "down")),
        ),
        final_norm(Same()),
        HEAD,
    ),
)

GEMMA_NORMS = (
    block_norm("attn_norm", "input_layernorm", PlusOne()),
    block_norm("post_attention_norm", "post_attention_layernorm", PlusOne()),
    block_norm("ffn_norm", "pre_feedforward_layernorm", PlusOne()),
    block_norm("post_ffw_norm", "post_feedforward_layernorm", PlusOne()),
)
GEMMA_TRAITS: tuple[Trait, ...] = (
    HeadSize(),
    activation("hidden_activation", "gelu_pytorch_tanh", "gelu_new"),
    NO_BIAS,
    must("use_bidirectional_attention", False, "a GGUF language model only looks back"),
)

GEMMA2 = Architecture(
    model_type="gemma2",
    graph="gemma2",
    class_name="Gemma2ForCausalLM",
    tied=True,
    keys=(
        *sizes(256000, 2304, 9216, 26, 8, 8192),
        kv_heads(4),
        free_head_dim(256),
        rms(1e-6),
        Key("attn_logit_softcapping", 50.0, "attn_logit_softcapping", kind=float),
        Key("final_logit_softcapping", 30.0, "final_logit_softcapping", kind=float),
    ),
    traits=(*GEMMA_TRAITS, Rope(("linear",)), WindowPattern(2), QueryScale(layers_of_27b=46)),
    weights=(EMBEDDING, *GEMMA_NORMS, *attention(Same(), Same()), *_gated(), final_norm(PlusOne()), HEAD),
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
        *sizes(262208, 2304, 9216, 26, 8, 131072),
        kv_heads(4),
        free_head_dim(256),
        rms(1e-6),
        Key("final_logit_softcapping", None, "final_logit_softcapping", kind=float, optional=True),
    ),
    traits=(
        *GEMMA_TRAITS,
        must("attn_logit_softcapping", None, "llama.cpp's graph caps no attention scores"),
        LocalRope(),
        WindowPattern(6),
        QueryScale(layers_of_27b=62),
    ),
    weights=(
        EMBEDDING,
        *GEMMA_NORMS,
        *attention(Same(), Same()),
        *(replace(norm, change=PlusOne()) for norm in QK_NORMS),
        *_gated(),
        final_norm(PlusOne()),
        HEAD,
    ),
    head="optional",
)

PHI3 = Architecture(
    model_type="phi3",
    graph="phi3",
    class_name="Phi3ForCausalLM",
    tied=False,
    keys=(*sizes(32064, 3072, 8192, 32, 32, 4096), kv_heads(None), rms(1e-5)),
    traits=(Rope(("longrope",), partial=1.0, original=4096), ClampedWindow(), activation("hidden_act", "silu")),
    weights=(
        EMBEDDING,
        *TWO_NORMS,
        Weight("blk.{i}.attn_qkv.weight", (f"{L}.self_attn.qkv_proj.weight",), ("q+kv+kv", "hidden")),
        Weight("blk.{i}.attn_output.weight", (f"{L}.self_attn.o_proj.weight",), ("hidden", "q")),
        Weight("blk.{i}.ffn_up.weight", (f"{L}.mlp.gate_up_proj.weight",), ("ff+ff", "hidden")),
        Weight("blk.{i}.ffn_down.weight", (f"{L}.mlp.down_proj.weight",), ("hidden", "ff")),
        final_norm(Same()),
        HEAD,
    ),
    renames=BARE_MODEL,
    ignored=MASKS,
)
