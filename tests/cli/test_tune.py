"""Training files from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    return tmp_path / "model"


def rounded(model: Path) -> Path:
    file = model.with_name("a.gguf")
    assert run(["quantize", str(model), "--recipe", "q4_0", "--rounding", "nearest", "-o", str(file)]) == 0
    return file


def test_a_file_is_trained_after_its_original(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = rounded(llama), tmp_path / "b.gguf"
    command = [
        "tune",
        str(file),
        "--teacher",
        str(llama),
        "--data",
        "docs",
        "--windows",
        "24",
        "--steps",
        "4",
        "--block-steps",
        "2",
    ]
    assert run([*command, "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Training on 72 windows, deciding on 8, following the original" in said
    assert "48 drawn anew in part" in said
    assert "Trained" in said
    assert f"whit eval {out} --against {llama}" in said
    assert out.stat().st_size == file.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "model"]
    assert run([*command, "-o", str(out)]) == 2
    assert "--force" in capsys.readouterr().err


def test_an_original_is_quantized_and_trained(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        "tune",
        str(llama),
        "--qat",
        "gptq-3bit-g32",
        "--data",
        "docs",
        "--windows",
        "24",
        "--steps",
        "4",
        "--block-steps",
        "2",
    ]
    assert run([*command, "-o", str(out)]) == 0
    assert (out / "config.json").exists()
    assert "following the original" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_without_a_teacher_the_text_is_learned(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = rounded(llama)
    command = ["tune", str(file), "--data", "docs", "--windows", "24", "--steps", "2"]
    assert run([*command, "-o", str(tmp_path / "b.gguf")]) == 0
    assert "predicting the text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--qat", "q4_0", "--teacher", "x"], "itself is the teacher"),
        (["--qat", "q9_9"], "q9_9"),
        (["--qat", "q4_0", "--preset", "heroic"], "heroic"),
        (["--train", "all"], "not a quantized"),
    ],
)
def test_what_makes_no_sense_is_said(
    llama: Path, tmp_path: Path, extra: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", str(llama), "-o", str(tmp_path / "b.gguf"), *extra]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
