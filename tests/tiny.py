"""Small random models of every architecture, from transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from whit.checkpoints.safetensors import DTYPES
from whit.checkpoints.source import TensorInfo
from whit.models.architecture import GGUFView

VOCAB = 256
WINDOW = 12

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_IDS,
}
_WIDE = {**_BASE, "head_dim": 32}  # heads wider than hidden / heads
_EXPERTS = {"num_experts_per_tok": 2, "max_position_embeddings": 128}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
    "original_max_position_embeddings": 300,
}
_GEMMA = {**_WIDE, "num_hidden_layers": 4, "query_pre_attn_scalar": 32, "sliding_window": WINDOW}
_OSS = {**_WIDE, "intermediate_size": 96, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": WINDOW}
_OPT = {k: v for k, v in _BASE.items() if k not in ("intermediate_size", "num_key_value_heads")}

_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_BASE),
    "llama-tied-biased": lambda: LlamaConfig(**_WIDE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-llama3-rope": lambda: LlamaConfig(**_BASE, rope_parameters=_LLAMA3),
    "llama-yarn": lambda: LlamaConfig(**_BASE, rope_parameters=_YARN),
    "llama-linear": lambda: LlamaConfig(
        **_BASE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "mistral": lambda: MistralConfig(**_WIDE, sliding_window=64),
    "mixtral": lambda: MixtralConfig(**_WIDE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": lambda: Qwen2Config(**_BASE),
    "qwen2-tied": lambda: Qwen2Config(**_BASE, tie_word_embeddings=True, rope_parameters=_YARN),
    "qwen3": lambda: Qwen3Config(**_WIDE),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "gemma2": lambda: Gemma2Config(**_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=4.0),
    "gemma3_text": lambda: Gemma3TextConfig(**{**_GEMMA, "num_hidden_layers": 7}),
    "gemma3-pattern": lambda: Gemma3TextConfig(
        **_GEMMA,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=4.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "phi3": lambda: Phi3Config(**_BASE, original_max_position_embeddings=128),
    "phi3-longrope": lambda: Phi3Config(
        **{**_BASE, "max_position_embeddings": 600}, original_max_position_embeddings=300, rope_parameters=_LONGROPE
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128, **_IDS),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in _BASE.items() if k != "num_key_value_heads"}),
    "gpt_neox-sequential": lambda: GPTNeoXConfig(
        **{k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
        use_parallel_residual=False,
        hidden_act="gelu_new",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "gpt_oss": lambda: GptOssConfig(**_OSS, rope_parameters={**_YARN, "truncate": True}),
    "opt": lambda: OPTConfig(**_OPT, ffn_dim=96),
}

TINY: tuple[str, ...] = tuple(_CONFIGS)


def tiny_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The model `name` of TINY in float32, with weights large enough that its logits are not nearly uniform.

    changes  configuration entries to set before the weights are drawn
    """
    config = _CONFIGS[name]()
    for entry, value in changes.items():
        setattr(config, entry, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Gemma's norms multiply by 1 + w.
            centre = 0.0 if parameter_name.endswith("bias") or config.model_type.startswith("gemma") else 1.0
            parameter.copy_(_draw(parameter.shape, centre, generator))
    return model


def save_tiny(name: str, folder: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write `tiny_model(name, seed)` into `folder` as transformers does, and return it."""
    model = tiny_model(name, seed, **changes)
    model.save_pretrained(folder)
    return model


def save_mxfp4(folder: Path, seed: int = 0, **changes: Any) -> None:
    """The tiny gpt_oss with experts in MXFP4 and everything else in bfloat16, as GPT-OSS is published."""
    model = tiny_model("gpt_oss", seed, **changes).bfloat16()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, W in model.state_dict().items():
        if W.dim() < 3:
            tensors[name] = W.clone()
            continue
        experts, cols, rows = W.shape
        blocks = torch.randint(0, 256, (experts, rows, cols // 32, 16), generator=generator, dtype=torch.uint8)
        blocks[0, 0, 0] = 0x88  # nothing but negative zeros
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(121, 125, blocks.shape[:3], generator=generator, dtype=torch.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {**model.config.to_dict(), "architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))


def random_tokens(n: int, seed: int = 0) -> list[int]:
    """`n` token ids."""
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def write_with_gguf(view: GGUFView, path: Path, half: bool) -> None:
    """Write a view with the gguf package: vectors in float32, matrices in float16 if `half`. No tokenizer."""
    writer = gguf.GGUFWriter(path, view.architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in view.metadata.items():
        if key != "general.architecture":
            add.get(type(value), writer.add_array)(key, value)
    writer.add_tokenizer_model("none")
    for tensor in view.tensors:
        W = torch.cat([part.read().float() for part in tensor.parts])
        writer.add_tensor(tensor.name, (W.half() if half and not tensor.keep_float else W).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class MemorySource:
    """Tensors from a dictionary, as a file would offer them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> Sequence[str]:
        """All names."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """What a header would say."""
        W = self._tensors[name]
        return TensorInfo(name, tuple(W.shape), _DTYPES[W.dtype], W.numel() * W.element_size())

    def read(self, name: str) -> torch.Tensor:
        """A copy."""
        return self._tensors[name].clone()


_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


def _draw(shape: torch.Size, centre: float, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values * 1.2 / shape[-1] ** 0.5
    # Multiples of 1/64: exact in every float format, and so is 1 + w.
    return centre + torch.round(values * 0.2 * 64) / 64
