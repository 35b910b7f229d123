"""SmolLM2 with a hidden size of 768: the same function, in rows that are whole superblocks of 256.

`python -m bench.stretched FILE.gguf` spreads the 576 hidden channels over 768 places, three of four, zeros between;
adds three query heads and one key/value head of zeros, so that rows of the output projection are whole too. RMSNorm
divides by the mean square over 768 channels of which a quarter are zero: its weights are multiplied with
sqrt(576 / 768) and its epsilon with 576 / 768, and nothing has changed. A mixture then meets the weights of a real
model in every type, which SmolLM2's own rows of 576 do not allow.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.checkpoints.source import TensorInfo, TensorSource
from whit.models.builtin import SMOLLM2
from whit.models.open import open_model
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named

WIDTH, HEADS, KV_HEADS = 768, 12, 4


class _Stretched:
    """The wider tensors as a source."""

    def __init__(self, plain: TensorSource, config: Mapping[str, Any]) -> None:
        self._plain, self._hidden = plain, config["hidden_size"]
        self._head = config["hidden_size"] // config["num_attention_heads"]
        group = WIDTH // (WIDTH - self._hidden)
        self._places = torch.tensor([i for i in range(WIDTH) if i % group != group - 1])

    def names(self) -> Sequence[str]:
        return self._plain.names()

    def info(self, name: str) -> TensorInfo:
        W = self.read(name)
        return TensorInfo(name, tuple(W.shape), "F32", 4 * W.numel())

    def read(self, name: str) -> Tensor:
        W, places = self._plain.read(name).float(), self._places
        if name.endswith("norm.weight"):
            return _spread(W * (self._hidden / WIDTH) ** 0.5, places, 0, WIDTH)
        if "o_proj" in name:
            W = _spread(W, torch.arange(W.shape[1]), 1, HEADS * self._head)
        elif "down_proj" not in name:
            W = _spread(W, places, 1, WIDTH)
        if "q_proj" in name:
            return _spread(W, torch.arange(W.shape[0]), 0, HEADS * self._head)
        if "k_proj" in name or "v_proj" in name:
            return _spread(W, torch.arange(W.shape[0]), 0, KV_HEADS * self._head)
        return _spread(W, places, 0, WIDTH) if "o_proj" in name or "down_proj" in name else W


def stretched(path: Path) -> None:
    """Write the wider model as a float32 GGUF file."""
    source = open_model(SMOLLM2)
    config = dict(source.config)
    shapes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    head = config["hidden_size"] // config["num_attention_heads"]
    wider = {
        **config,
        **shapes,
        "head_dim": head,
        "rms_norm_eps": config["rms_norm_eps"] * config["hidden_size"] / WIDTH,
    }
    model = replace(source, config=wider, tensors=_Stretched(source.tensors, config), gguf_tensors=None)
    write_gguf(model, recipe_named("f32"), path, overwrite=True)


def _spread(W: Tensor, places: Tensor, dim: int, size: int) -> Tensor:
    shape = list(W.shape)
    shape[dim] = size
    return torch.zeros(shape).index_copy_(dim, places, W)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    stretched(parser.parse_args().path)
