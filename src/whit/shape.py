"""The dimensions of a transformer, from its configuration or its tensors' shapes: what memory depends on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from whit.errors import ModelError


@dataclass(frozen=True)
class Shape:
    """The dimensions of a transformer that memory depends on.

    hidden          width of the residual stream
    heads           query heads; kv_heads: heads whose keys and values are cached
    head_dim        width of one head
    intermediate    width inside the feed-forward layer (of all experts that one token visits)
    vocab           rows of the output head
    sliding_layers  how many of the layers see only the last `window` positions
    window          positions that these layers keep
    max_context     positions that the model was made for, where known
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    sliding_layers: int = 0
    window: int = 0
    max_context: int | None = None

    def matrices(self) -> list[tuple[int, int]]:
        """[rows, cols] of the seven matrices of every gated block: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q)]
        feed_forward = [(self.intermediate, self.hidden)] * 2 + [(self.hidden, self.intermediate)]
        return (attention + feed_forward) * self.layers


# Shapes that are published, for a forecast when only a number of parameters is known.
KNOWN_SHAPES: dict[str, tuple[int, Shape]] = {
    "SmolLM2 135M": (134_515_008, Shape(30, 576, 9, 3, 64, 1536, 49152)),
    "SmolLM2 360M": (361_821_120, Shape(32, 960, 15, 5, 64, 2560, 49152)),
    "Llama 3.2 1B": (1_235_814_400, Shape(16, 2048, 32, 8, 64, 8192, 128256)),
    "Llama 3.2 3B": (3_212_749_824, Shape(28, 3072, 24, 8, 128, 8192, 128256)),
    "Llama 3.1 8B": (8_030_261_248, Shape(32, 4096, 32, 8, 128, 14336, 128256)),
    "Mistral Nemo 12B": (12_247_782_400, Shape(40, 5120, 32, 8, 128, 14336, 131072)),
    "Qwen2.5 32B": (32_763_876_352, Shape(64, 5120, 40, 8, 128, 27648, 152064)),
    "Llama 3.1 70B": (70_553_706_496, Shape(80, 8192, 64, 8, 128, 28672, 128256)),
    "Llama 3.1 405B": (405_853_388_800, Shape(126, 16384, 128, 8, 128, 53248, 128256)),
}


def plausible_shape(n_parameters: int) -> tuple[str, Shape]:
    """The published model that is nearest in size, by ratio, and its shape."""
    name = min(KNOWN_SHAPES, key=lambda each: abs(math.log(KNOWN_SHAPES[each][0] / n_parameters)))
    return name, KNOWN_SHAPES[name][1]


# One fact under the names that transformers' configurations give it.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner"),
    "expert": ("moe_intermediate_size",),
    "vocab": ("vocab_size",),
    "max_context": ("max_position_embeddings", "n_positions", "max_seq_len"),
}
# Families that alternate by their class default: every n-th layer is full, the others slide.
_FULL_EVERY = {"gemma2": 2, "gpt_oss": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the language model (multimodal ones nest it)."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def shape_from_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes.

    Raises ModelError that names what is missing or is not a positive whole number.
    """
    config = text_config(config)
    found = {fact: _first(config, names) for fact, names in _NAMES.items()}
    missing = [_NAMES[fact][0] for fact in ("layers", "hidden", "heads", "vocab") if found[fact] is None]
    if missing:
        raise ModelError(f"config.json does not say {', '.join(missing)}, which the memory to run depends on.")
    layers, hidden, heads = found["layers"] or 0, found["hidden"] or 0, found["heads"] or 0
    intermediate = found["expert"] or found["intermediate"] or 4 * hidden  # GPT-2 leaves out the usual 4 x hidden
    visited = _first(config, ("num_experts_per_tok",)) or 1
    sliding, window = _sliding(config, layers)
    return Shape(
        layers,
        hidden,
        heads,
        found["kv_heads"] or heads,
        found["head_dim"] or hidden // heads,
        intermediate * visited,
        found["vocab"] or 0,
        sliding,
        window,
        found["max_context"],
    )


def _first(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json: {name} is {value!r}, but a positive whole number is needed.")
        return value
    return None


def _sliding(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """How many layers see only a window, and how wide it is; (0, 0) without one."""
    window = _first(config, ("sliding_window",))
    if window is None or config.get("use_sliding_window") is False:
        return 0, 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return min(kinds.count("sliding_attention"), layers), window
    full_every = _first(config, ("sliding_window_pattern",)) or _FULL_EVERY.get(str(config.get("model_type")))
    if full_every:
        return layers - layers // full_every, window
    if config.get("use_sliding_window"):  # Qwen: only the layers from here on
        return max(layers - (_first(config, ("max_window_layers",)) or 0), 0), window
    return layers, window


def count_parameters(shapes: Mapping[str, tuple[int, ...]], tied: bool) -> int:
    """Parameters in a set of tensors, each weight once.

    shapes  tensor name -> dimensions
    tied    whether the output head is the embedding; a file may hold both, and the head is then not counted
    Attention masks and rotary frequencies, which old checkpoints store beside the weights, are not parameters.
    """
    return sum(math.prod(shape) for name, shape in _weights(shapes, tied).items())


def widest_used_row(shapes: Mapping[str, tuple[int, ...]], tied: bool) -> int | None:
    """The row width, in weights, that most weights of the matrices share; None without a matrix."""
    widths: dict[int, int] = {}
    for shape in _weights(shapes, tied).values():
        if len(shape) > 1:
            widths[shape[-1]] = widths.get(shape[-1], 0) + math.prod(shape)
    return max(widths, key=lambda width: widths[width]) if widths else None


_NOT_PARAMETERS = re.compile(r"\.(inv_freq|masked_bias)$")
_HEADS = ("lm_head.weight", "embed_out.weight")


def _weights(shapes: Mapping[str, tuple[int, ...]], tied: bool) -> dict[str, tuple[int, ...]]:
    def counts(name: str, shape: tuple[int, ...]) -> bool:
        mask = name.endswith(".bias") and len(shape) == 4  # GPT-2's and GPT-NeoX's triangles
        twice = tied and name in _HEADS and any(s == shape for other, s in shapes.items() if other != name)
        return not (mask or twice or _NOT_PARAMETERS.search(name))

    return {name: shape for name, shape in shapes.items() if counts(name, shape)}
