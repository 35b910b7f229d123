"""Files of several sizes, measured, with a table, a JSON file and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model", vocab_size=TOY_VOCAB, max_position_embeddings=512)
    save_toy_tokenizer("llama", tmp_path / "model")
    return tmp_path / "model"


def test_files_of_all_sizes_are_written_measured_and_drawn(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other.gguf", tmp_path / "out"
    assert run(["quantize", str(llama), "--recipe", "q4_0", "--rounding", "nearest", "-o", str(other)]) == 0
    arguments = ["--points", "2", "--windows", "2", "--compare", str(other), "-o", str(out)]
    assert run(["frontier", str(llama), *arguments]) == 0
    found = json.loads((out / "frontier.json").read_text())
    assert [each["by"] for each in found] == ["Whit", "Whit", "others"]
    for each in found:
        path = other if each["by"] == "others" else out / each["file"]
        assert each["bytes"] == path.stat().st_size
        assert each["kl_mean"] > 0
    assert found[1]["kl_mean"] < found[0]["kl_mean"]
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (out / "frontier.svg").read_text()
    shown = capsys.readouterr().out
    assert "other.gguf" in shown


def test_what_cannot_be_compared_says_so_first(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["frontier", str(llama), "--compare", str(tmp_path / "no.gguf"), "-o", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
