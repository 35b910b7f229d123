"""Second moments of the original, gathered once: what is rounded for them, and passes that are stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import BrokenFileError
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.effort import Calibration
from whit.pipeline.folder import write_model
from whit.pipeline.observe import gather_statistics
from whit.pipeline.quantize import Result, model_view, plan_gguf
from whit.pipeline.statistics import Statistics
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.rounding.methods import Effort

TEXT = torch.tensor(random_tokens(8 * 64, 0)).view(8, 64)


class Stop(BaseException):
    """Nobody catches this."""


def saved(folder: Path, kind: str = "llama", **changes: object) -> Path:
    save_tiny(kind, folder, vocab_size=TOY_VOCAB, **changes)
    save_toy_tokenizer("llama", folder)
    return folder


def gathered(model: Model, path: Path, stop: str = "") -> Statistics:
    def tell(done: int, total: int, what: str) -> None:
        if what == stop:
            raise Stop

    statistics, steps = Statistics(path), plan_gguf(model, recipe_named("f32")).steps
    gather_statistics(model, model_view(model), steps, TEXT, statistics, tell)
    return statistics


def written(model: Model, out: Path, name: str, statistics: Statistics | None) -> Result:
    recipe = folder_recipe(name, "feedback") or recipe_named(name, "feedback")
    calibration = Calibration(TEXT, effort=Effort(sweeps=1), statistics=statistics)
    return write_model(model, recipe, out, calibration=calibration)


def values(path: Path) -> dict[str, Tensor]:
    read = open_model(path)
    return {name: read.tensors.read(name).float() for name in read.tensors.names()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("statistics") / "llama")


@pytest.mark.parametrize("name", ["q4_0", "gptq-4bit-g32"])
def test_the_first_block_is_rounded_as_by_a_pass_of_its_own(llama: Path, tmp_path: Path, name: str) -> None:
    model = open_model(llama)
    own = written(model, tmp_path / "own", name, None)
    shared = written(model, tmp_path / "shared", name, gathered(model, tmp_path / "statistics"))
    firsts = [each.name for each in own.losses if each.name.startswith("blk.0.")]
    assert len(firsts) == 7
    for expected, found in zip(own.losses, shared.losses, strict=True):
        assert found.name == expected.name
        if found.name in firsts:
            assert found.plain == pytest.approx(expected.plain, rel=1e-4)
            assert found.loss == pytest.approx(expected.loss, rel=0.02)  # a tie of two codes may fall otherwise
    ours, theirs = values(tmp_path / "shared"), values(tmp_path / "own")
    for key in (key for key in ours if "layers.0." in key):
        assert (ours[key] == theirs[key]).float().mean() > 0.97  # an error that is fed on moves others with it
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)  # later blocks see another prefix


def test_later_blocks_are_rounded_for_what_the_original_gives_them(llama: Path, tmp_path: Path) -> None:
    model = open_model(llama)
    statistics = gathered(model, tmp_path / "statistics")
    one, other = (written(model, tmp_path / name, name, statistics) for name in ("q4_0", "q8_0"))
    by_name = {each.name: each for each in other.losses}
    for each in one.losses:
        assert each.loss <= each.plain
        assert each.n_tokens == by_name[each.name].n_tokens
        assert each.n_tokens == (0 if "embd" in each.name else TEXT.numel())


@pytest.mark.parametrize("at", ["block 1", "head"])
def test_a_pass_that_was_stopped_goes_on_to_the_same_moments(llama: Path, tmp_path: Path, at: str) -> None:
    model = open_model(llama)
    whole = gathered(model, tmp_path / "whole")
    with pytest.raises(Stop):
        gathered(model, tmp_path / "again", stop=at)
    assert not Statistics(tmp_path / "again").complete
    gathered(model, tmp_path / "again")
    contents = [{file.name: file.read_bytes() for file in path.iterdir()} for path in (whole.path, tmp_path / "again")]
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"block-00000", "block-00001", "head"}


def test_damaged_statistics_are_refused_with_what_to_do(llama: Path, tmp_path: Path) -> None:
    model = open_model(llama)
    statistics = gathered(model, tmp_path / "statistics")
    raw = bytearray((statistics.path / "block-00001").read_bytes())
    raw[-100] ^= 1
    (statistics.path / "block-00001").write_bytes(raw)
    with pytest.raises(BrokenFileError, match="Delete the folder"):
        written(model, tmp_path / "out.gguf", "q4_0", statistics)
    assert not (tmp_path / "out.gguf").exists()


def test_experts_and_fixed_scales_of_activations_are_in_the_statistics(tmp_path: Path) -> None:
    model = open_model(saved(tmp_path / "mixtral", "mixtral"))
    result = written(model, tmp_path / "out.gguf", "q4_0", gathered(model, tmp_path / "statistics"))
    experts = [each for each in result.losses if "exps" in each.name]
    assert len(experts) == 2 * 3 * 4
    assert all(each.loss <= each.plain * (1 + 1e-6) for each in experts)


def test_fixed_scales_of_activations_come_from_them(llama: Path, tmp_path: Path) -> None:
    model = open_model(llama)
    written(model, tmp_path / "own", "w8a8-static", None)
    written(model, tmp_path / "shared", "w8a8-static", gathered(model, tmp_path / "statistics"))
    from safetensors.torch import load_file

    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("shared", "own"))
    scales = [key for key in ours if key.endswith("input_scale")]
    assert len(scales) == 14
    for key in scales:
        assert ours[key].item() == pytest.approx(theirs[key].item(), rel=0.05)


def test_a_run_for_statistics_keeps_no_state_of_its_own(llama: Path, tmp_path: Path) -> None:
    model = open_model(llama)
    statistics = gathered(model, tmp_path / "statistics")
    calibration = Calibration(TEXT, effort=Effort(sweeps=1), statistics=statistics)
    seen: list[list[str]] = []
    write_model(
        model,
        recipe_named("q4_0", "feedback"),
        tmp_path / "out.gguf",
        progress=lambda *_: seen.append(sorted(path.name for path in tmp_path.iterdir())),
        calibration=replace(calibration, source="x"),
    )
    assert seen
    assert all(".out.gguf.quantizing" not in names for names in seen)
