"""Names of devices, and what is said of those that are not there. On a GPU: the results of the CPU."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elsewhere import elsewhere
from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.imatrix import ImportanceMatrix
from whit.cli.app import run
from whit.devices import CPU, device_named
from whit.errors import RecipeError
from whit.evaluation.compare import compare
from whit.models.model import Model
from whit.models.open import open_model
from whit.models.sampling import resampled_windows, sampled_windows
from whit.models.stream import BlockStream
from whit.pipeline.allocate import Allocator
from whit.pipeline.distil import Distilled, Training, distil_gguf
from whit.pipeline.effort import Calibration
from whit.pipeline.folder import write_model
from whit.pipeline.observe import gather_statistics
from whit.pipeline.quantize import gather_importance, model_view, plan_gguf, write_gguf
from whit.pipeline.sensitivity import sensitivities
from whit.pipeline.spotcheck import measured
from whit.pipeline.statistics import Statistics
from whit.recipes.folders import folder_recipe
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
@pytest.mark.parametrize(
    "verb", ["quantize", "eval", "verify", "tune", "distil", "imatrix", "plan", "frontier", "release", "report"]
)
def test_a_gpu_that_is_not_there_is_a_message(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path / "m", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "m")
    out, against = ["-o", str(tmp_path / "a")], ["--against", str(tmp_path / "m")]
    wanted = {
        "quantize": [*out, "--recipe", "q8_0"],
        "plan": ["--predict"],
        "distil": [*out, *against],
        "report": [*out, *against],
    }
    rest = wanted.get(verb, against if verb in ("eval", "verify") else out)
    assert run([verb, str(tmp_path / "m"), *rest, "--device", "cuda"]) == 2
    assert "--device cuda: torch" in capsys.readouterr().err


@pytest.fixture
def tiny(tmp_path: Path) -> Model:
    save_tiny("llama", tmp_path / "m", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "m")
    return open_model(tmp_path / "m")


TEXT = torch.tensor(random_tokens(8 * 32)).view(8, 32)


def calibrated(rounding: str, recipe: str = "q4_0") -> Callable[[Model, torch.device, Path], object]:
    def run(model: Model, device: torch.device, folder: Path) -> object:
        calibration = Calibration(TEXT, 0.5, Effort(sweeps=1), device=device)
        named = folder_recipe(recipe, rounding) if recipe.startswith("kmeans") else recipe_named(recipe, rounding)
        return write_model(model, named, folder / "out", calibration=calibration)

    return run


def sensitivity(model: Model, device: torch.device, folder: Path) -> object:
    allocator = Allocator(model)
    return sensitivities(model, allocator.candidates, TEXT, device=device)


def spotcheck(model: Model, device: torch.device, folder: Path) -> object:
    pairs = [("blk.0.ffn_up.weight", "q4_0"), ("token_embd.weight", "q8_0"), ("output_norm.weight", "f16")]
    return measured(model, pairs[:2], TEXT, lambda done, total, what: None, device)


def statistics(model: Model, device: torch.device, folder: Path) -> object:
    steps = plan_gguf(model, recipe_named("f32")).steps
    return gather_statistics(model, model_view(model), steps, TEXT, Statistics(folder / "kept"), device=device)


def distilled(model: Model, device: torch.device, folder: Path) -> object:
    write_gguf(model, recipe_named("q4_0"), folder / "start.gguf")
    start, out = open_model(folder / "start.gguf"), folder / "better.gguf"
    return distil_gguf(model, start, out, TEXT[4:], TEXT[:4], Training(steps=2), device=device)


RUNS: dict[str, Callable[[Model, torch.device, Path], object]] = {
    "feedback": calibrated("feedback"),
    "fisher": calibrated("fisher-feedback", "kmeans-4bit"),
    "sensitivities": sensitivity,
    "spotcheck": spotcheck,
    "importance": lambda model, device, folder: gather_importance(model, TEXT, "", device=device),
    "statistics": statistics,
    "distil": distilled,
    "sampled": lambda model, device, folder: sampled_windows(model, 3, 16, device=device),
    "resampled": lambda model, device, folder: resampled_windows(model, TEXT, 2, device=device),
}


@pytest.mark.parametrize("name", RUNS)
def test_everything_is_where_it_is_computed(
    name: str, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device without values: what is wrong with it is not seen, that something stayed behind is."""
    moved: list[torch.device] = []
    run_block = BlockStream.run

    def seen(self: BlockStream, *args: object, **kwargs: object) -> Tensor:
        moved.append(self.device)
        return run_block(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockStream, "run", seen)
    monkeypatch.setattr("whit.pipeline.distil._fast", lambda device: nullcontext())  # torch knows none there
    with elsewhere(monkeypatch) as device:
        RUNS[name](tiny, device, tmp_path)
    assert "sampled" in name or device in moved


@GPU
@pytest.mark.parametrize("name", ["sensitivities", "spotcheck", "importance", "distil"])
def test_a_gpu_finds_what_the_processor_does(name: str, tiny: Model, tmp_path: Path) -> None:
    found = []
    for device in (CPU, torch.device("cuda", 0)):
        (tmp_path / device.type).mkdir()
        found.append(figures(RUNS[name](tiny, device, tmp_path / device.type)))
    assert found[1] == pytest.approx(found[0], rel=0.02, abs=1e-6)


def figures(found: object) -> list[float]:
    """The numbers in a result."""
    if isinstance(found, ImportanceMatrix):
        return [float(x) for each in found.means.values() for x in each.flatten()]
    if isinstance(found, Distilled):
        return [found.before, found.after]
    if isinstance(found, dict):
        return [x for each in found.values() for x in figures(each)]
    return [float(x) for x in found] if isinstance(found, list) else [float(found)]  # type: ignore[arg-type]


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
