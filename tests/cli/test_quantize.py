import json
from pathlib import Path

import pytest
import torch

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run
from whit.models.open import open_model
from whit.models.skeleton import load_module


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model", intermediate_size=100, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    return tmp_path / "model"


def test_the_size_the_types_and_every_exception_are_printed(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(llama), "--recipe", "Q4_0", "-o", str(tmp_path / "a.gguf")]) == 0
    shown = capsys.readouterr().out
    assert f"{(tmp_path / 'a.gguf').stat().st_size / 1e6:.2f} MB" in shown
    assert "F32: 2 x blk.*.attn_norm.weight" in shown
    assert "F16: 2 x blk.*.ffn_down.weight (rows of 100 weights do not divide into Q4_0 blocks of 32)" in shown
    assert "already quantized" not in shown


def test_quantizing_a_quantized_file_warns(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(llama), "--recipe", "q8_0", "-o", str(tmp_path / "a.gguf")]) == 0
    assert run(["quantize", str(tmp_path / "a.gguf"), "--recipe", "q4_0", "-o", str(tmp_path / "b.gguf")]) == 0
    assert "already quantized (Q8_0)" in capsys.readouterr().out


def test_the_report_says_what_every_tensor_lost(llama: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "a.gguf", tmp_path / "a.json"
    arguments = ["--recipe", "q4_0", "--windows", "4", "--preset", "fast", "--report", str(report)]
    assert run(["quantize", str(llama), "-o", str(out), *arguments]) == 0
    content = json.loads(report.read_text())
    assert content["bytes"] == out.stat().st_size
    assert "calibration half of the documentation" in content["calibration"]
    losses = {each["name"]: each for each in content["tensors"]}
    assert losses["blk.0.attn_q.weight"]["loss"] < losses["blk.0.attn_q.weight"]["plain"]
    assert losses["blk.0.attn_q.weight"]["n_tokens"] == 4 * 128  # what the model reads at once


def test_calibration_takes_a_text_of_ones_own(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("A text of my own about nothing much. " * 200)
    assert run(["quantize", str(llama), "--recipe", "q4_0", "--calib", str(text), "-o", str(tmp_path / "a.gguf")]) == 0
    assert "mine.txt" in capsys.readouterr().out


def test_calibration_on_text_that_the_model_writes(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "q4_0", "--calib", "sampled", "--windows", "3", "--preset", "fast"]
    assert run(["quantize", str(llama), *arguments, "-o", str(tmp_path / "a.gguf")]) == 0
    assert "3 windows of 128 tokens sampled from the model itself" in capsys.readouterr().out
    assert run(["quantize", str(llama), *arguments, "-o", str(tmp_path / "b.gguf")]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("name", ["m.gguf", "m.dat"])
def test_an_importance_matrix_is_written_and_used(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    matrix, out = tmp_path / name, tmp_path / "a.gguf"
    assert run(["imatrix", str(llama), "-o", str(matrix), "--windows", "4"]) == 0
    assert "matrices, 512 tokens" in capsys.readouterr().out
    assert run(["quantize", str(llama), "--recipe", "q4_0", "--imatrix", str(matrix), "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"Calibrating on the importance matrix {matrix}" in shown
    assert "Squared output error" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "heroic"], "no preset called 'heroic'. Known presets: fast, balanced, best"),
        (["--rounding", "magic"], "no rounding called 'magic'"),
        (["--set", "blk.9.attn_q=q8_0"], "blk.9.attn_q.weight matches no tensor"),
        (["--calib", "missing.txt"], "missing.txt: cannot be read"),
        (["--calib", "some/dataset"], "For a data set on the hub write hf:some/dataset"),
        (["--imatrix", "missing.gguf"], "missing.gguf: no such file"),
        (["--set", "blk.0.attn_q=int4"], "GGUF has no type for the grid int4"),
    ],
)
def test_bad_choices_are_explained(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "a.gguf"
    assert run(["quantize", str(llama), "--recipe", "q4_0", "-o", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("recipe", "rounding", "grid"),
    [
        ("uniform-4bit", "nearest", "int4-asym"),
        ("kmeans-4bit", "feedback", "kmeans4"),
        ("K_M-3bit-g32", "fisher-feedback", "kmeans3-g32"),
        ("kmeans-2bit-tensor", "fisher", "kmeans2-tensor"),
        ("K_L-4bit", "nearest", "int4-asym"),
        ("kl-output-4bit", "feedback", "int4-asym"),
    ],
)
def test_quantizers_by_name_write_folders_that_are_read_back(
    tmp_path: Path, recipe: str, rounding: str, grid: str
) -> None:
    save_tiny("llama", tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--recipe", recipe, "--rounding", rounding, "--windows", "2", "--preset", "fast", "-o", str(out)]
    assert run(["quantize", str(tmp_path / "model"), *arguments]) == 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "whit"
    assert set(config["grids"].values()) == {grid}
    ids = torch.arange(64)[None]
    logits = [load_module(open_model(folder))(ids).logits for folder in (tmp_path / "model", out)]
    assert (logits[1] - logits[0]).norm() < logits[0].norm()


def test_fisher_information_is_not_in_an_importance_matrix(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "q4_0", "--rounding", "fisher", "--imatrix", str(tmp_path / "none.gguf")]
    assert run(["quantize", str(llama), *arguments, "-o", str(tmp_path / "a.gguf")]) == 2
    assert "takes gradients on a text" in capsys.readouterr().err
    arguments = ["--recipe", "kmeans-4bit", "--rounding", "kl", "-o", str(tmp_path / "b")]
    assert run(["quantize", str(llama), *arguments]) == 2
    assert "ranges of scales" in capsys.readouterr().err
