"""Names of devices, and what is said of those that are not there. On a GPU: the results of the CPU."""

from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile
from whit.cli.app import run
from whit.devices import CPU, device_named
from whit.errors import RecipeError
from whit.evaluation.compare import compare
from whit.models.open import open_model
from whit.pipeline.effort import Calibration
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named
from whit.rounding.methods import Effort
from whit.tune.files import tune_file
from whit.tune.train import Tuning

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def gpus(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    assert device_named("auto") == CPU
    gpus(monkeypatch, 1)
    assert device_named("auto") == torch.device("cuda", 0)


def test_ranks_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 3)
    assert [device_named("cuda", rank).index for rank in range(4)] == [0, 1, 2, 0]
    assert [device_named("cuda:2,cuda:0", rank).index for rank in range(4)] == [2, 0, 2, 0]


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "", "mps", "cuda:-1"])
def test_what_is_no_device_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    gpus(monkeypatch, 1)
    with pytest.raises(RecipeError, match="is not one of cpu, cuda"):
        device_named(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ["quantize", "eval", "verify", "tune"])
def test_a_gpu_that_is_not_there_is_a_message(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path / "m", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "m")
    wanted = {"quantize": ["-o", str(tmp_path / "a"), "--recipe", "q8_0"], "tune": ["-o", str(tmp_path / "a")]}
    rest = wanted.get(verb, ["--against", str(tmp_path / "m")])
    assert run([verb, str(tmp_path / "m"), *rest, "--device", "cuda"]) == 2
    assert "--device cuda: torch" in capsys.readouterr().err


@GPU
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_gpu_quantizes_and_measures_as_the_processor_does(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path / "m", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "m")
    model, text = open_model(tmp_path / "m"), torch.tensor(random_tokens(8 * 32)).view(8, 32)
    for name, device in (("cpu", CPU), ("gpu", torch.device("cuda", 0))):
        calibration = Calibration(text, 0.5, Effort(sweeps=1), device=device)
        write_gguf(model, recipe_named("q4_0", "feedback"), tmp_path / name, calibration=calibration)
    cpu, gpu = GGUFFile(tmp_path / "cpu"), GGUFFile(tmp_path / "gpu")
    for name in cpu.names():
        assert (cpu.read(name) - gpu.read(name)).norm() <= 0.02 * cpu.read(name).norm() + 1e-6
    on_cpu = compare(open_model(tmp_path / "cpu"), model, text)
    on_gpu = compare(open_model(tmp_path / "cpu"), model, text, device=torch.device("cuda", 0))
    assert on_gpu.kl_mean == pytest.approx(on_cpu.kl_mean, rel=0.02)


@GPU
@pytest.mark.parametrize("recipe", ["q4_0", "q4_k", "iq3_s"])
def test_a_gpu_trains_as_the_processor_does(recipe: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", vocab_size=TOY_VOCAB, hidden_size=256, intermediate_size=256)
    save_toy_tokenizer("llama", tmp_path / "m")
    model, text = open_model(tmp_path / "m"), torch.tensor(random_tokens(12 * 32)).view(12, 32)
    write_gguf(model, recipe_named(recipe), tmp_path / "start.gguf")
    found = [
        tune_file(
            open_model(tmp_path / "start.gguf"),
            tmp_path / f"{device.type}.gguf",
            text[4:],
            text[:4],
            model,
            Tuning(steps=8, block_steps=8),
            device=device,
        )
        for device in (CPU, torch.device("cuda", 0))
    ]
    assert found[1].before == pytest.approx(found[0].before, rel=0.02)
    assert found[1].after == pytest.approx(found[0].after, rel=0.05)
    sizes = [(tmp_path / f"{kind}.gguf").stat().st_size for kind in ("start", "cpu", "cuda")]
    assert len(set(sizes)) == 1
