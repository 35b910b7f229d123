"""The disk that an unfinished job takes, against what lies there just before it ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import whit.pipeline.state
from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.models.open import open_model
from whit.pipeline.effort import Calibration
from whit.pipeline.forecast import WINDOW, state_bytes
from whit.pipeline.quantize import plan_gguf, write_gguf
from whit.recipes.named import recipe_named
from whit.rounding.methods import Effort

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": TOY_VOCAB}


@pytest.mark.parametrize("recipe", ["q4_0", "q4_k_m"])
def test_the_state_takes_what_is_forecast(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "model", **WIDE)
    save_toy_tokenizer("llama", tmp_path / "model")
    model, wanted = open_model(tmp_path / "model"), recipe_named(recipe, "feedback")
    kept: list[int] = []

    def noted(path: Path) -> None:
        kept.append(sum(file.stat().st_size for file in path.iterdir()))
        shutil.rmtree(path)

    monkeypatch.setattr(whit.pipeline.state, "shutil", type("noting", (), {"rmtree": staticmethod(noted)}))
    text = torch.tensor(random_tokens(4 * 32)).view(4, 32)
    write_gguf(model, wanted, tmp_path / "a.gguf", calibration=Calibration(text, 0.0, Effort(sweeps=1)))
    hidden = 4 * text.numel() * WIDE["hidden_size"]  # once: the other copy is there for a moment
    codes = state_bytes(plan_gguf(model, wanted), 1) - 2 * 4 * WINDOW * WIDE["hidden_size"]
    assert kept[0] == pytest.approx(codes + hidden, rel=0.03)


def test_plain_rounding_keeps_nothing(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path)
    assert state_bytes(plan_gguf(open_model(tmp_path), recipe_named("q4_0", "nearest")), 8) == 0
