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
        (["--set", "blk.9.attn_q=q8_0"], "blk.9.attn_q matches no matrix"),
        (["--calib", "missing.txt"], "missing.txt: cannot be read"),
        (["--calib", "some/dataset"], "For a data set on the hub write hf:some/dataset"),
        (["--imatrix", "missing.gguf"], "missing.gguf: no such file"),
        (["--keep", "blk.0.attn_q=int4"], "GGUF has no type int4"),
    ],
)
def test_bad_choices_are_explained(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "a.gguf"
    assert run(["quantize", str(llama), "--recipe", "q4_0", "-o", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_kept_matrices_are_named_and_saved_recipes_hold_them(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, first, second = tmp_path / "r.json", tmp_path / "a.gguf", tmp_path / "b.gguf"
    plain = ["--rounding", "nearest"]
    keep = ["--keep", "lm_head=f16", "--keep", "*.v_proj=q8_0", "--save-recipe", str(saved)]
    assert run(["quantize", str(llama), "--recipe", "q4_0", *plain, *keep, "-o", str(first)]) == 0
    shown = capsys.readouterr().out
    assert "kept, Q8_0: 2 x blk.*.attn_v.weight" in shown
    assert "kept, F16: 1 x output.weight" in shown
    assert run(["quantize", str(llama), "--recipe", str(saved), *plain, "-o", str(second)]) == 0
    types = [_types(path) for path in (first, second)]
    assert types[0] == types[1]
    assert (types[0]["output.weight"], types[0]["blk.1.attn_v.weight"]) == ("F16", "Q8_0")
    changed = ["--recipe", str(saved), *plain, "--keep", "lm_head=q8_0", "--force", "-o", str(second)]
    assert run(["quantize", str(llama), *changed]) == 0
    assert _types(second)["output.weight"] == "Q8_0"


def test_a_budget_leaves_kept_matrices_alone(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = tmp_path / "t.json", tmp_path / "a.gguf"
    keep = ["--keep", "lm_head=bf16", "--keep", "blk.1.attn_v=q5_1"]
    assert run(["plan", str(llama), "--windows", "2", "--save", str(table)]) == 0
    fit = ["--fit", "200kB", "--rounding", "nearest", "--table", str(table)]
    assert run(["quantize", str(llama), *fit, *keep, "-o", str(out)]) == 0  # bf16 is in no sweep
    assert out.stat().st_size <= 200_000
    assert (_types(out)["output.weight"], _types(out)["blk.1.attn_v.weight"]) == ("BF16", "Q5_1")
    capsys.readouterr()
    odd = ["--keep", "blk.1.attn_v=tq2_0"]
    assert run(["plan", str(llama), "--table", str(table), "--points", "3", *keep]) == 0
    assert "--keep lm_head=bf16 --keep blk.1.attn_v=q5_1 -o OUT.gguf" in capsys.readouterr().out
    assert run(["plan", str(llama), "--table", str(table), "--points", "3", *odd]) == 2
    assert "cannot be on tq2_0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "lm_haed=f16"], "lm_haed matches no matrix. Close to it: lm_head"),
        (["--keep", "lm_head=q6"], "GGUF has no type q6"),
        (["--keep", "lm_head"], "not of the form 'pattern=type'"),
    ],
)
def test_what_cannot_be_kept_leaves_no_file(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for wanted in (["--recipe", "q4_0"], ["--fit", "1MB"]):
        assert run(["quantize", str(llama), *wanted, *arguments, "-o", str(tmp_path / "a.gguf")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "a.gguf").exists()


def _types(path: Path) -> dict[str, str]:
    source = open_model(path).gguf_tensors
    assert source is not None
    return {name: source.info(name).dtype for name in source.names()}


def test_a_share_of_the_weights_goes_to_eight_bits(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, saved, table = tmp_path / "a.gguf", tmp_path / "r.json", tmp_path / "t.json"
    recipe = ["--recipe", "q4_0", "--windows", "2", "--preset", "fast", "--keep", "blk.0.attn_q=f16"]
    share = ["--salient", "20%", "--save-recipe", str(saved)]
    assert run(["quantize", str(llama), *recipe, *share, "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    types = _types(out)
    raised = [name for name, kind in types.items() if kind == "Q8_0"]
    assert raised
    assert types["blk.0.attn_q.weight"] == "F16"
    assert all(f"{name}: q4_0 -> q8_0" in shown for name in raised)
    assert f"{out.stat().st_size / 1e6:.2f} MB" in shown
    again = tmp_path / "b.gguf"
    assert run(["quantize", str(llama), "--recipe", str(saved), *recipe[2:6], "-o", str(again)]) == 0
    assert _types(again) == types
    assert run(["plan", str(llama), "--windows", "2", "--save", str(table)]) == 0
    assert run(["quantize", str(llama), *recipe, *share, "--table", str(table), "-o", str(out), "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "q4_0", "--salient", "lots"], "is not a share of the weights"),
        (["--recipe", "f16", "--salient", "1%"], "no matrix here that could go to a better type"),
        (["--fit", "1MB", "--salient", "1%"], "--salient is for recipes"),
        (["--recipe", "q4_0", "--table", "t.json"], "a recipe needs none"),
    ],
)
def test_what_salient_refuses(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["quantize", str(llama), *arguments, "-o", str(tmp_path / "a.gguf")]) == 2
    assert message in capsys.readouterr().err


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
