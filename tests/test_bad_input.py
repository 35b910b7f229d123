"""Bad input at the command line: one clear sentence, the right exit status, no traceback, nothing half-written."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small, sound Llama folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("bad") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB, max_position_embeddings=1024)
    save_toy_tokenizer("llama", folder)
    return folder


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def quantize(model: Path | str, out: Path, *more: str) -> int:
    return run(["quantize", str(model), "--recipe", "q8_0", "--rounding", "nearest", "-o", str(out), *more])


def refused(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> None:
    """The last command was refused with one message that has these words."""
    shown = capsys.readouterr().err
    assert status == 2, shown
    assert shown.count("whit: ") == 1
    assert "Traceback" not in shown
    for word in words:
        assert word in shown, shown


def test_a_sound_model_is_quantized(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(llama, tmp_path / "out.gguf") == 0
    assert "MB" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_truncated_shard(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = broken / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    refused(capsys, quantize(broken, tmp_path / "out.gguf"), "truncated", "model.safetensors")
    assert not (tmp_path / "out.gguf").exists()


def test_a_corrupt_header(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = broken / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[8:40] = b"#" * 32
    shard.write_bytes(raw)
    refused(capsys, quantize(broken, tmp_path / "out.gguf"), "corrupt")


def test_a_missing_shard(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight_map = dict.fromkeys(load_file(broken / "model.safetensors"), "model-00001-of-00002.safetensors")
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(capsys, quantize(broken, tmp_path / "out.gguf"), "1 of 1 shards are missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_name_the_tensor(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, broken / "model.safetensors")
    refused(capsys, quantize(broken, tmp_path / "out.gguf"), "blk.1.ffn_up.weight", "1 of", "NaN or infinite")
    assert not list(tmp_path.glob("*out*"))


def test_weights_beyond_half_precision_name_the_tensor(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e9
    save_file(tensors, broken / "model.safetensors")
    refused(capsys, quantize(broken, tmp_path / "out.gguf"), "blk.0.ffn_up.weight", "does not fit float16")


def test_a_missing_tensor_is_named(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    refused(capsys, quantize(broken, tmp_path / "out.gguf"), "model.layers.1.mlp.up_proj.weight")


def test_an_unknown_architecture_lists_the_known(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((broken / "config.json").read_text()) | {"model_type": "quokka"}
    (broken / "config.json").write_text(json.dumps(config))
    refused(capsys, quantize(broken, tmp_path / "out.gguf"), "quokka", "llama", "gpt2")


def test_an_unknown_recipe_lists_the_known(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(["quantize", str(llama), "--recipe", "q9_9", "-o", str(tmp_path / "out.gguf")])
    refused(capsys, status, "q9_9", "q4_0")


def test_a_truncated_gguf(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(llama, tmp_path / "a.gguf") == 0
    capsys.readouterr()
    os.truncate(tmp_path / "a.gguf", (tmp_path / "a.gguf").stat().st_size - 64)
    refused(capsys, quantize(tmp_path / "a.gguf", tmp_path / "b.gguf"), "truncated", "a.gguf")


@pytest.mark.parametrize("model", ["no/such/place", "nowhere.gguf", "nowhere"])
def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    refused(capsys, quantize(model, tmp_path / "out.gguf"), model, "no such file or folder")


def test_a_file_that_exists_needs_force(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.gguf").write_bytes(b"precious")
    refused(capsys, quantize(llama, tmp_path / "out.gguf"), "--force")
    assert (tmp_path / "out.gguf").read_bytes() == b"precious"
    assert quantize(llama, tmp_path / "out.gguf", "--force") == 0


def test_a_folder_that_is_not_there(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, quantize(llama, tmp_path / "gone" / "out.gguf"), "no such folder")


def test_a_place_that_cannot_be_written(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, quantize(llama, Path("/proc/out.gguf")), "/proc")


@pytest.fixture
def small_files() -> object:
    """Files of this process cannot grow past 16 KB, as on a disk that fills up."""
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, old[1]))
    yield None
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_files: object
) -> None:
    refused(capsys, quantize(llama, tmp_path / "out.gguf"), "full")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("whit.pipeline.plain.check_finite", interrupted)
    assert quantize(llama, tmp_path / "out.gguf") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_text_too_short_to_score(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    status = run(["eval", str(llama), "--against", str(llama), "--text", str(tmp_path / "short.txt")])
    refused(capsys, status, "too short", "512")


def test_a_text_that_is_not_there(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, run(["eval", str(llama), "--against", str(llama), "--text", "nowhere.txt"]), "nowhere.txt")


def test_models_of_different_vocabularies_are_not_compared(
    llama: Path, broken: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_tiny("gpt2", tmp_path / "gpt2", vocab_size=TOY_VOCAB + 8, max_position_embeddings=1024)
    save_toy_tokenizer("gpt2", tmp_path / "gpt2")
    refused(capsys, run(["eval", str(llama), "--against", str(tmp_path / "gpt2")]), "512 tokens", "520")


def test_a_folder_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(capsys, run(["inspect", str(tmp_path)]), "no .safetensors file")


def test_something_that_is_no_model_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_text("hello")
    refused(capsys, run(["run", str(tmp_path / "a.gguf"), "hi"]), "not a GGUF file")
    refused(capsys, run(["inspect", str(tmp_path / "a.gguf")]), "not a GGUF file")


@pytest.mark.parametrize("arguments", [["quantize"], ["explain", "pie"], ["memory", "many"], ["dance"]])
def test_a_wrong_command_line_has_status_two(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_itself_exits_with_the_status(tmp_path: Path) -> None:
    whit = Path(sys.executable).with_name("whit")
    done = subprocess.run([whit, "inspect", tmp_path / "gone"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("whit: ")
    assert len(done.stderr.splitlines()) == 1
