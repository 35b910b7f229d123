"""Measured divergences of single tensors beside those of whole files with one tensor quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.quantize import write_gguf
from whit.pipeline.spotcheck import measured
from whit.recipes.recipe import Recipe, Rule


@pytest.mark.parametrize("kind", ["llama", "llama-tied-biased", "gemma2"])
def test_one_tensor_measured_is_a_file_with_that_tensor(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    model = open_model(tmp_path / "model")
    windows = torch.tensor([random_tokens(32, seed) for seed in range(3)])
    pairs = [("token_embd.weight", "q4_0"), ("blk.1.attn_q.weight", "q5_0"), ("blk.0.ffn_down.weight", "q4_0")]
    if kind == "llama":
        pairs.append(("output.weight", "q4_0"))
    found = measured(model, pairs, windows, lambda done, total, what: None)

    def log_p(path: Path) -> torch.Tensor:
        with torch.inference_mode():
            return load_module(open_model(path))(input_ids=windows, use_cache=False).logits.double().log_softmax(-1)

    original = log_p(tmp_path / "model")
    for (name, grid), each in zip(pairs, found, strict=True):
        recipe = Recipe("one", (Rule(name, grid), Rule("*", "f32")))
        write_gguf(model, recipe, tmp_path / "one.gguf", overwrite=True)
        divergence = (original.exp() * (original - log_p(tmp_path / "one.gguf"))).sum(-1).mean().item()
        assert each == pytest.approx(divergence, rel=1e-3)
