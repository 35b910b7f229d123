"""Factors that nobody would choose, folded into models of every kind: what they compute stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile
from whit.evaluation.compare import compare
from whit.models.open import open_model
from whit.pipeline.effort import Calibration
from whit.pipeline.quantize import Result, write_gguf
from whit.recipes.named import recipe_named
from whit.rounding.methods import Effort
from whit.transforms.absorb import Pair

# norms that must have absorbed factors, per kind
ABSORB = {
    "llama": {"attn_norm", "ffn_norm"},
    "qwen2": {"attn_norm", "ffn_norm"},
    "qwen3": {"attn_norm", "ffn_norm"},
    "gemma2": {"attn_norm", "ffn_norm"},
    "gemma3_text": {"attn_norm", "ffn_norm"},
    "phi3": {"attn_norm", "ffn_norm"},
    "gpt2": {"attn_norm", "ffn_norm"},
    "gpt_neox": {"attn_norm", "ffn_norm"},
    "mixtral": {"attn_norm"},
}


def text(n: int, seed: int = 0) -> Tensor:
    return torch.tensor(random_tokens(n * 64, seed)).view(n, 64)


def saved(kind: str, folder: Path) -> Path:
    save_tiny(kind, folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("gpt2" if kind in ("gpt2", "gpt_neox") else "llama", folder)
    return folder


def absurd(samples: object, c: object, channel: Tensor) -> Tensor:
    return torch.arange(int(channel.max()) + 1).mul(2.0).sin().exp()


def written(folder: Path, out: Path, recipe: str = "q8_0", **effort: bool) -> Result:
    calibration = Calibration(text(4), 0.0, Effort(sweeps=0, **effort))
    return write_gguf(open_model(folder), recipe_named(recipe, "feedback"), out, calibration=calibration)


@pytest.mark.parametrize("kind", list(ABSORB))
def test_any_factors_leave_the_function_as_it_was(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(kind, tmp_path)
    monkeypatch.setattr("whit.pipeline.folding.column_factors", absurd)
    before, after = tmp_path / "before.gguf", tmp_path / "after.gguf"
    written(tmp_path, before, rescale=False)
    written(tmp_path, after)
    original, changed = GGUFFile(before), GGUFFile(after)
    norms = {n for n in ABSORB[kind] if not torch.equal(*(f.read(f"blk.1.{n}.weight") for f in (original, changed)))}
    assert norms == ABSORB[kind]
    kl = [compare(open_model(f), open_model(tmp_path), text(4, seed=5)).kl_mean for f in (before, after)]
    assert kl[1] < 10 * kl[0] + 1e-6


def test_a_pair_that_changes_the_block_is_not_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", tmp_path)

    def wrong(shapes: dict[str, tuple[int, ...]], prefix: str, heads: int) -> list[Pair]:
        cols = shapes[f"{prefix}attn_q.weight"][1]
        return [Pair((f"{prefix}ffn_norm.weight",), (f"{prefix}attn_q.weight",), torch.arange(cols))]

    written(folder, tmp_path / "before.gguf", rescale=False)
    monkeypatch.setattr("whit.pipeline.folding.column_factors", absurd)
    monkeypatch.setattr("whit.pipeline.folding.block_pairs", wrong)
    written(folder, tmp_path / "after.gguf")
    before, after = GGUFFile(tmp_path / "before.gguf"), GGUFFile(tmp_path / "after.gguf")
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names() if name.startswith("blk."))


def test_weights_that_are_copied_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", tmp_path)
    written(folder, tmp_path / "once.gguf", rescale=False)
    monkeypatch.setattr("whit.pipeline.folding.column_factors", absurd)
    written(tmp_path / "once.gguf", tmp_path / "again.gguf")
    first, second = (GGUFFile(tmp_path / f"{name}.gguf") for name in ("once", "again"))
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names())
