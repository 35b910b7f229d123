import json
from pathlib import Path

import pytest

from tiny import save_tiny
from whit.cli.app import run
from whit.models.builtin import packaged_smollm2


def test_a_gguf_file_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(packaged_smollm2())]) == 0
    shown = capsys.readouterr().out
    for expected in ("general.architecture", "blk.29.ffn_down.weight", "Q4_1", "576 x 1536", "272 tensors"):
        assert expected in shown
    assert "(49,152 items)" in shown.replace("\n", " ")


def test_a_folder_is_listed_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("gpt2", tmp_path)
    capsys.readouterr()
    assert run(["inspect", str(tmp_path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["metadata"]["model_type"] == "gpt2"
    tensor = next(t for t in content["tensors"] if t["name"].endswith("wte.weight"))
    assert (tensor["type"], tensor["bits"]) == ("F32", 32.0)
    assert sum(t["bytes"] for t in content["tensors"]) <= content["bytes"]


def test_a_safetensors_file_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path)
    assert run(["inspect", str(tmp_path / "model.safetensors")]) == 0
    assert "model.embed_tokens.weight" in capsys.readouterr().out


def test_a_file_of_an_unknown_architecture_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "quokka"}')
    assert run(["inspect", str(tmp_path)]) == 0
    assert "quokka" in capsys.readouterr().out
