"""What `whit plan` says from headers against what is written; the frontier that it predicts, and its checks."""

from __future__ import annotations

import json
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


def test_larger_files_are_predicted_to_lose_less(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(llama), "--windows", "3", "--points", "5", "--check", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = found["sizes"]
    assert [each["bytes"] for each in sizes] == sorted(each["bytes"] for each in sizes)
    assert [each["kl"] for each in sizes] == sorted((each["kl"] for each in sizes), reverse=True)
    assert sizes[-1]["bits_per_weight"] <= 8.5
    assert len(found["checked"]) == 4
    assert all(each["measured"] > 0 for each in found["checked"])


def test_a_kept_sweep_is_used_again(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.json"
    assert run(["plan", str(llama), "--windows", "3", "--check", "3", "--save", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "Predicted / measured" in shown
    assert f"--table {table}" in shown
    assert run(["plan", str(llama), "--table", str(table)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert all(row in shown for row in rows)
    out = tmp_path / "a.gguf"
    budget = ["--fit", "1MB", "--table", str(table), "--preset", "fast", "--windows", "3"]
    assert run(["quantize", str(llama), *budget, "-o", str(out)]) == 0
    assert out.stat().st_size <= 10**6


def test_folders_and_types_of_ones_own_are_predicted(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(llama), "--windows", "2", "--points", "3"]
    assert run([*arguments, "--format", "compressed-tensors", "--types", "int4-g32,nvfp4,fp8"]) == 0
    shown = capsys.readouterr().out
    assert "--types int4-g32,nvfp4,fp8 --format compressed-tensors -o OUT" in shown
    assert "int8" not in shown
    assert run([*arguments, "--types", "nf4-g64"]) == 2
    assert "--types: GGUF has no type nf4-g64" in capsys.readouterr().err
    assert run([*arguments, "--types", "q6_k"]) == 2
    assert "no matrix of" in capsys.readouterr().err
    assert run([*arguments, "--format", "onnx"]) == 2
    assert "--format onnx is not one of gguf" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("recipe", ["q4_0", "q4_k_m", "w8a16", "whit-int4-g32"])
def test_planned_bytes_are_those_of_what_is_written(
    name: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(name, tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    asked = [str(tmp_path / "model"), "--recipe", recipe, "--rounding", "nearest"]
    status = run(["plan", *asked, "--no-time", "--json"])
    if status == 2:  # a format that cannot hold this model is refused by both
        assert run(["quantize", *asked, "-o", str(tmp_path / "out")]) == 2
        return
    found = json.loads(capsys.readouterr().out)["recipes"][0]
    assert run(["quantize", *asked, "-o", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    files = [out] if out.is_file() else list(out.glob("*.safetensors"))
    assert found["bytes"] == sum(file.stat().st_size for file in files)


def test_what_cannot_be_done_is_status_one(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", str(llama), "--recipe", "q4_k_m", "--no-time"]
    assert run(asked) == 0
    assert "output_norm.weight (norms stay in float)" in capsys.readouterr().out
    assert run([*asked, "--ram", "1MB"]) == 1
    assert "--ram allows 1.0 MB" in capsys.readouterr().err
    assert run([*asked, "--fit", "1kB"]) == 1
    assert run(["plan", str(llama), "--fit", "1kB"]) == 1
    assert "The smallest output has" in capsys.readouterr().err
    assert run(["plan", str(llama), "--fit", "1MB"]) == 0
    assert run(["plan", str(llama)]) == 0
    assert run([*asked, "--predict"]) == 2


def test_time_is_forecast_for_a_recipe_unless_it_shall_not(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", str(llama), "--recipe", "q4_0", "--rounding", "nearest"]
    assert run([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recipes"][0]
    assert found["seconds"] == pytest.approx(sum(each["seconds"] for each in found["parts"].values()))
    assert {"starting", "rounding", "reading", "writing", "verdict"} <= set(found["parts"])
    assert found["threads"] >= 1
    assert run([*asked, "--no-time", "--json"]) == 0
    assert "seconds" not in json.loads(capsys.readouterr().out)["recipes"][0]


def test_what_cannot_be_timed_is_said(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(llama), "--recipe", "q4_0", "--rounding", "fisher"]) == 0
    assert "time: not known: roundings that take gradients" in capsys.readouterr().out


def test_a_gpu_must_hold_the_job(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", str(llama), "--recipe", "q4_k_m", "--no-time"]
    assert run([*asked, "--gpu", "8GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recipes"][0]
    assert 0 < found["gpu_bytes"] < found["ram_bytes"]
    assert run([*asked, "--gpu", "10kB"]) == 1
    assert "--gpu allows 0.0 MB" in capsys.readouterr().err


def test_what_a_result_takes_is_that_of_the_runtime_it_is_for(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(llama), "--recipe", "q8_0", "--recipe", "w8a16", "--no-time", "--json"]) == 0
    gguf, folder = json.loads(capsys.readouterr().out)["recipes"]
    assert (gguf["runtime"], folder["runtime"]) == ("llama.cpp", "vllm")
    assert gguf["run_gpu_bytes"] < gguf["run_bytes"]  # the embedding stays with the processor
    assert folder["run_gpu_bytes"] == folder["run_bytes"]


def test_a_training_is_forecast_with_what_comes_before(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", str(llama), "--recipe", "gptq-4bit-g32", "--preset", "fast", "--windows", "4", "--json"]
    assert run([*asked, "--no-time"]) == 0
    alone = json.loads(capsys.readouterr().out)["recipes"][0]
    assert run([*asked, "--tune"]) == 0
    tuned = json.loads(capsys.readouterr().out)["recipes"][0]
    assert tuned["gpu_bytes"] > alone["gpu_bytes"]
    assert tuned["seconds"] == pytest.approx(sum(each["seconds"] for each in tuned["parts"].values()))
    assert {"quantizing", "blocks", "steps from end to end", "text drawn anew", "other text"} <= set(tuned["parts"])
    assert run(["plan", str(llama), "--tune"]) == 2
    assert "name one with --recipe" in capsys.readouterr().err
