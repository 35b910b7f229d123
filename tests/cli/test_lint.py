import json
from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    recipe = ["--recipe", "gptq-4bit-g32", "--rounding", "nearest"]
    assert run(["quantize", str(tmp_path / "model"), *recipe, "-o", str(tmp_path / "gptq")]) == 0
    return tmp_path / "gptq"


def test_every_runtime_gets_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lint", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "transformers: runs it\n" in shown
    assert "vLLM: runs it\n" in shown
    assert "llama.cpp: does not run it" in shown


def test_a_wrong_label_is_an_exit_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    assert run(["lint", str(folder), "--json"]) == 1
    assert "off by one step" in capsys.readouterr().out


def test_nothing_to_look_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lint", str(tmp_path / "nope")]) == 2
    assert run(["lint", str(tmp_path)]) == 2
    assert "config.json is missing" in capsys.readouterr().err
