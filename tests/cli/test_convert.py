from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    recipe = ["--recipe", "gptq-4bit-g32", "--rounding", "nearest"]
    assert run(["quantize", str(tmp_path / "model"), *recipe, "-o", str(tmp_path / "gptq")]) == 0
    return tmp_path / "gptq"


def test_another_format_has_the_same_values(gptq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(gptq), "--format", "gguf", "-o", str(tmp_path / "a.gguf")]) == 0
    assert "14 matrices have exactly the values that they had" in capsys.readouterr().out
    assert run(["convert", str(tmp_path / "a.gguf"), "--format", "awq", "-o", str(tmp_path / "awq")]) == 0
    assert run(["convert", str(tmp_path / "awq"), "--format", "awq", "-o", str(tmp_path / "awq")]) == 2
    assert "--force" in capsys.readouterr().err


def test_what_is_lost_is_said_and_wants_a_yes(gptq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--recipe", "whit-iq4_nl", "--rounding", "nearest"]
    assert run(["quantize", str(tmp_path / "model"), *recipe, "-o", str(tmp_path / "nl")]) == 0
    command = ["convert", str(tmp_path / "nl"), "--format", "gptq", "-o", str(tmp_path / "b")]
    assert run(command) == 2
    assert "--requantize" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert run([*command, "--requantize"]) == 0
    assert "was rounded again to" in capsys.readouterr().out
