"""`whit verify` and the verdict of `whit quantize`, from the command line."""

import json
from pathlib import Path

import pytest

from trained import save_trained
from whit.checkpoints.gguf import GGUFFile
from whit.cli import quantize
from whit.cli.app import run
from whit.pipeline.afterwards import Look


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "model"
    save_trained(folder, steps=50)
    return folder


@pytest.fixture(scope="module")
def file(model: Path) -> Path:
    out = model.parent / "q8_0.gguf"
    assert (
        run(["quantize", str(model), "--recipe", "q8_0", "--rounding", "nearest", "--no-verify", "-o", str(out)]) == 0
    )
    return out


def zeroed(file: Path, out: Path) -> Path:
    raw = GGUFFile(file).raw("blk.0.ffn_up.weight")
    raw[:34] = 0
    with out.open("wb") as written:
        GGUFFile(file).with_changes(written, [("blk.0.ffn_up.weight", raw)])
    return out


def test_an_untouched_file_is_excellent(model: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(file), "--against", str(model), "--windows", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("Verdict: excellent\n")
    for part in ("read by two decoders", "KL divergence", "perplexity ratio", "greedy continuations", "KL alone, nats"):
        assert part in shown


def test_a_damaged_file_is_an_exit_status_and_a_name(
    model: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zeroed(file, tmp_path / "zeroed.gguf")
    assert run(["verify", str(path), "--against", str(model), "--windows", "1"]) == 1
    shown = capsys.readouterr().out
    assert shown.endswith("Verdict: damaged\n")
    assert "fault: blk.0.ffn_up.weight: about 32 weights are zero" in shown


def test_json_has_it_all(model: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = zeroed(file, tmp_path / "zeroed.gguf")
    assert run(["verify", str(path), "--against", str(model), "--windows", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "damaged"
    assert found["faults"][0].startswith("blk.0.ffn_up.weight")
    assert found["culprits"][0]["name"] == "blk.0.ffn_up.weight"
    assert found["culprits"][0]["kl"] > 0
    assert found["kl_mean"] > 0
    assert found["continuations"]["prompts"] == 1


def test_a_broken_file_is_a_verdict_and_a_missing_one_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert run(["verify", str(tmp_path / "a.gguf"), "--against", str(model)]) == 1
    assert "truncated" in (shown := capsys.readouterr().out)
    assert shown.endswith("Verdict: broken\n")
    assert run(["verify", str(tmp_path / "b.gguf"), "--against", str(model)]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "a.gguf"), "--against", "nowhere"]) == 2


@pytest.mark.parametrize("recipe", ["q8_0", "gptq-4bit-g32"])
def test_quantize_ends_with_a_verdict(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    arguments = ["quantize", str(model), "--recipe", recipe, "--rounding", "nearest", "-o", str(tmp_path / "out.gguf")]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "tensors are what was to be written" in shown
    assert "\nVerdict: " in shown


def test_quantize_without_a_verdict(file: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", "q8_0", "--rounding", "nearest", "--no-verify", "--force", "-o", str(file)]
    assert run(["quantize", str(model), *arguments]) == 0
    assert "Verdict" not in capsys.readouterr().out


def test_what_was_not_to_be_written_is_an_exit_status(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize, "look", lambda *_: Look(None, None, "", 3, ("1 of 3 tensors",)))
    arguments = ["quantize", str(model), "--recipe", "q8_0", "--rounding", "nearest", "-o", str(tmp_path / "out.gguf")]
    assert run(arguments) == 1
    assert "1 of 3 tensors. The file is damaged" in capsys.readouterr().err
