"""Distillation from the command line, after rounding and on its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run
from whit.cli.calibration import shared_out
from whit.errors import TextError


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    save_tiny("gpt2", tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("gpt2", tmp_path / "model")
    return tmp_path / "model"


def test_after_rounding_or_later_the_file_is_the_same(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, one, two = tmp_path / "plain.gguf", tmp_path / "one.gguf", tmp_path / "two.gguf"
    quantize = ["quantize", str(gpt2), "--recipe", "q4_0", "--rounding", "nearest"]
    assert run([*quantize, "-o", str(plain)]) == 0
    assert run([*quantize, "--distil", "4", "--calib", "docs", "-o", str(one)]) == 0
    assert "Distil" in capsys.readouterr().out
    distil = ["distil", str(plain), "--against", str(gpt2), "--steps", "4", "--calib", "docs", "-o", str(two)]
    assert run(distil) == 0
    assert "deciding on 8" in capsys.readouterr().out
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one.gguf", "plain.gguf", "two.gguf"]
    assert run(distil) == 2  # it exists
    assert "--force" in capsys.readouterr().err


def test_windows_to_decide_on_are_spread_and_not_trained_on() -> None:
    ids = torch.arange(72)[:, None]
    held_out, train = shared_out(ids)
    assert len(held_out) == 8
    assert sorted([*held_out[:, 0].tolist(), *train[:, 0].tolist()]) == list(range(72))
    assert (held_out[1:] - held_out[:-1]).min() >= 7
    with pytest.raises(TextError, match="too few"):
        shared_out(ids[:3])
