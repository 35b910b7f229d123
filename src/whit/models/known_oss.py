"""GPT-OSS: experts woven into one tensor, attention sinks, a window in every other block.

Names on disk are those of transformers' GptOssForCausalLM, whose experts the published folders hold in MXFP4
(checkpoints/schemes.py); names and keys in GGUF are those that llama.cpp's converter writes.
"""

from __future__ import annotations

from whit.models.known_changes import Same, Woven
from whit.models.known_gated import (
    BARE_MODEL,
    EMBEDDING,
    L,
    attention,
    block_norm,
    final_norm,
    free_head_dim,
    kv_heads,
    rms,
)
from whit.models.known_rope import Rope
from whit.models.known_shared import HEAD, MASKS, must, sizes
from whit.models.known_table import Architecture, Key, Weight
from whit.models.known_traits import Also, HeadSize, WindowPattern

ONE_ACTIVATION = "llama.cpp's graph has no other number there"
GATE, UP, DOWN = (f"blk.{{i}}.ffn_{part}_exps" for part in ("gate", "up", "down"))
EXPERTS = f"{L}.mlp.experts"
# What the class stands for when config.json is silent.
YARN = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"truncate": False, "original_max_position_embeddings": 4096},
}


def _woven(part: int, kind: str) -> Woven:
    return Woven(part, (f"{GATE}.{kind}", f"{UP}.{kind}"))


GPT_OSS = Architecture(
    model_type="gpt_oss",
    graph="gpt-oss",
    class_name="GptOssForCausalLM",
    tied=False,
    keys=(
        *sizes(201088, 2880, 2880, 36, 64, 131072, ff_key="expert_feed_forward_length"),
        kv_heads(8),
        free_head_dim(64),
        rms(1e-5),
        Key("num_local_experts", 128, "expert_count", "experts", aliases=("num_experts",)),
        Key("num_experts_per_tok", 4, "expert_used_count", "experts_used", aliases=("experts_per_token",)),
    ),
    traits=(
        HeadSize(),
        Rope(("yarn",), theta=150000.0, unsaid=YARN, truncate=False),
        WindowPattern(2, 128),
        Also("feed_forward_length", "ff"),
        must("hidden_act", "silu", ONE_ACTIVATION),
        must("swiglu_alpha", 1.702, ONE_ACTIVATION),
        must("swiglu_limit", 7.0, ONE_ACTIVATION),
        must("attention_bias", True, "llama.cpp's graph needs the biases"),
    ),
    weights=(
        EMBEDDING,
        block_norm("attn_norm", "input_layernorm", Same()),
        *attention(Same(), Same()),
        *attention(Same(), Same(), kind="bias"),
        Weight("blk.{i}.attn_sinks.weight", (f"{L}.self_attn.sinks",), ("heads",)),
        block_norm("post_attention_norm", "post_attention_layernorm", Same()),
        Weight("blk.{i}.ffn_gate_inp.weight", (f"{L}.mlp.router.weight",), ("experts", "hidden")),
        Weight("blk.{i}.ffn_gate_inp.bias", (f"{L}.mlp.router.bias",), ("experts",)),
        Weight(f"{GATE}.weight", (f"{EXPERTS}.gate_up_proj",), ("experts", "ff", "hidden"), _woven(0, "weight")),
        Weight(f"{UP}.weight", (f"{EXPERTS}.gate_up_proj",), ("experts", "ff", "hidden"), _woven(1, "weight")),
        Weight(f"{DOWN}.weight", (f"{EXPERTS}.down_proj",), ("experts", "hidden", "ff"), Woven(0, (f"{DOWN}.weight",))),
        Weight(f"{GATE}.bias", (f"{EXPERTS}.gate_up_proj_bias",), ("experts", "ff"), _woven(0, "bias")),
        Weight(f"{UP}.bias", (f"{EXPERTS}.gate_up_proj_bias",), ("experts", "ff"), _woven(1, "bias")),
        Weight(f"{DOWN}.bias", (f"{EXPERTS}.down_proj_bias",), ("experts", "hidden")),
        final_norm(Same()),
        HEAD,
    ),
    head="required",
    renames=BARE_MODEL,
    ignored=MASKS,
)
