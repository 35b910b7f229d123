"""Files that are trained: same format, and decoded they are exactly what was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile
from whit.errors import ModelError, OutputError
from whit.evaluation.compare import compare
from whit.layouts.ggml import GGML_TYPES
from whit.models.open import open_model
from whit.pipeline.folder import write_model
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.tune import files, state
from whit.tune.files import tune_file
from whit.tune.train import Run, Tuning

WINDOWS = torch.tensor([random_tokens(48, seed) for seed in range(70)])  # less is known by heart
HELD_OUT, TRAIN = WINDOWS[:6], WINDOWS[6:]
QUICK = Tuning(
    steps=12, batch=8, at_once=8, block_steps=40, block_batch=8, rate=0.03, scale_rate=0.003, vector_rate=0.003
)


def saved(kind: str, recipe: str, folder: Path) -> tuple[Path, Path]:
    """A model and a file of it, rounded to nearest."""
    if not (folder / "model").exists():
        save_tiny(kind, folder / "model", vocab_size=TOY_VOCAB)
        save_toy_tokenizer("gpt2" if kind in ("gpt2", "opt") else "llama", folder / "model")
    chosen = folder_recipe(recipe, "nearest") or recipe_named(recipe)
    path = folder / f"{recipe}{'.gguf' if chosen.layout == 'gguf' else ''}"
    write_model(open_model(folder / "model"), chosen, path)
    return folder / "model", path


def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What the model in memory holds when it is settled, by the names of parameters."""
    seen: list[dict[str, torch.Tensor]] = []
    settle = files.settle

    def note(model: torch.nn.Module) -> None:
        settle(model)
        seen.append({name: each.detach().clone() for name, each in model.named_parameters()})

    monkeypatch.setattr(files, "settle", note)
    return seen


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("llama", "q4_0"),
        ("llama", "q4_k_m"),
        ("gpt2", "q4_0"),
        ("gemma2", "q5_1"),
        ("phi3", "q4_1"),
        ("mixtral", "q4_0"),
        ("opt", "q4_0"),
        ("llama", "gptq-4bit-g32"),
        ("llama", "gptq-3bit-g32-asym"),
        ("llama", "awq-4bit-g32"),
        ("llama", "w2a16-g32"),
        ("llama", "mxfp4"),
        ("llama", "whit-nf4-g32"),
        ("gpt2", "whit-int3-g32"),
        ("llama", "whit-kmeans2+2%"),
        ("gemma2", "w4a16-g32"),
        ("mixtral", "whit-int4-g32"),
    ],
)
def test_what_is_written_is_what_was_trained(
    kind: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, file = saved(kind, recipe, tmp_path)
    seen, out = watched(monkeypatch), tmp_path / f"out{file.suffix}"
    found = tune_file(open_model(file), out, TRAIN, HELD_OUT, open_model(original), QUICK)
    assert found.steps > 0
    assert found.after < found.before
    assert found.moved > 0 or recipe in ("q4_1", "q5_1")  # whose levels are near to each other
    before, after = open_model(file), open_model(out)
    assert after.n_bytes == before.n_bytes
    assert {n: before.tensors.info(n).dtype for n in before.tensors.names()} == {
        n: after.tensors.info(n).dtype for n in after.tensors.names()
    }
    from whit.live.checkpoint import live_checkpoint

    live = live_checkpoint(out, torch.float32)
    (trained,) = seen
    checked = 0
    for name, value in trained.items():
        module, _, own = name.rpartition(".")
        written = getattr(live.get_submodule(module), own)
        if value.dim() == 1:  # GGUF adds one to Gemma's norms, and back costs the last bit
            assert torch.allclose(written, value, rtol=1e-3, atol=1e-3), name
        else:
            assert torch.equal(written.contiguous(), value), name
        checked += 1
    assert checked > 8


def test_a_gguf_file_keeps_everything_else(tmp_path: Path) -> None:
    original, file = saved("llama", "q4_k_m", tmp_path)
    tune_file(open_model(file), tmp_path / "out.gguf", TRAIN, HELD_OUT, open_model(original), QUICK)
    before, after = GGUFFile(file), GGUFFile(tmp_path / "out.gguf")
    assert before.metadata == after.metadata
    assert [(n, before.info(n)) for n in before.names()] == [(n, after.info(n)) for n in after.names()]


@pytest.mark.parametrize("train", ["scales", "lora"])
def test_scales_and_low_rank(train: str, tmp_path: Path) -> None:
    original, file = saved("llama", "q4_0", tmp_path)
    settings = replace(QUICK, train=train, rank=4, rate=0.06)
    found = tune_file(open_model(file), tmp_path / "out.gguf", TRAIN, HELD_OUT, open_model(original), settings)
    assert found.changed
    assert (found.moved > 0) == (train == "lora")
    before, after = GGUFFile(file), GGUFFile(tmp_path / "out.gguf")
    kind, others, scales = GGML_TYPES["Q4_0"], 0, 0
    for name in before.names():
        if before.info(name).dtype == "Q4_0":
            rows, cols = before.info(name).shape
            first, second = (kind.unpack(each.raw(name), (rows, cols)) for each in (before, after))
            others += int((first.codes != second.codes).sum())
            scales += int((first.params["scale"] != second.params["scale"]).sum())
    assert (others > 0) == (train == "lora")
    assert scales > 0


def test_levels_and_outliers_beside_codes_learn_and_codes_stay_with_scales(tmp_path: Path) -> None:
    original, file = saved("llama", "whit-kmeans2+2%", tmp_path)
    settings = replace(QUICK, train="scales")
    found = tune_file(open_model(file), tmp_path / "out", TRAIN, HELD_OUT, open_model(original), settings)
    assert found.changed
    first, second = (load_file(each / "model.safetensors") for each in (file, tmp_path / "out"))
    moved = {name.rpartition(".")[2] for name, value in first.items() if not torch.equal(value, second[name])}
    assert moved == {"weight", "weight_levels", "weight_values"}  # norms, tables, and what lies beside
    learned = [name for name in first if name.endswith(("weight_levels", "weight_values"))]
    assert not any(torch.equal(first[name], second[name]) for name in learned)


def test_the_evaluator_sees_the_gain(tmp_path: Path) -> None:
    original, file = saved("llama", "gptq-3bit-g32", tmp_path)
    settings = replace(QUICK, steps=40)
    found = tune_file(open_model(file), tmp_path / "out", TRAIN, HELD_OUT, open_model(original), settings)
    fresh = torch.tensor([random_tokens(48, seed) for seed in range(300, 306)])
    first, second = (compare(open_model(original), open_model(each), fresh) for each in (file, tmp_path / "out"))
    assert second.kl_mean < first.kl_mean
    assert found.after < 0.9 * found.before


def test_without_a_teacher_the_text_is_learned(tmp_path: Path) -> None:
    _, file = saved("llama", "q4_0", tmp_path)
    text = WINDOWS[:1].repeat(8, 1)  # one window, to be known by heart
    settings = Tuning(steps=40, batch=4, rate=0.2, scale_rate=0.02, vector_rate=0.02)
    found = tune_file(open_model(file), tmp_path / "out.gguf", text, text[:1], None, settings)
    assert found.after < 0.9 * found.before


def test_a_training_in_vain_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    original, file = saved("llama", "q8_0", tmp_path)
    far = Tuning(steps=4, batch=2, block_steps=2, rate=50.0, scale_rate=1.0, vector_rate=1.0)
    found = tune_file(open_model(file), tmp_path / "out.gguf", TRAIN, HELD_OUT, open_model(original), far)
    assert found.steps == 0
    assert found.before == found.after
    assert (tmp_path / "out.gguf").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("recipe", ["q4_0", "gptq-4bit-g32", "whit-kmeans2+2%"])
def test_a_killed_run_goes_on_to_the_same_bytes(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, file = saved("llama", recipe, tmp_path)
    monkeypatch.setattr(state, "SECONDS", 0.0)
    whole, cut = tmp_path / f"whole{file.suffix}", tmp_path / f"cut{file.suffix}"
    arguments = TRAIN, HELD_OUT, open_model(original), QUICK
    tune_file(open_model(file), whole, *arguments)
    save = state.Keeper.save

    class Killed(BaseException):
        pass

    for after in (1, 3, 8):  # in the middle of the blocks, soon after them, and much later
        left = [after]

        def killed(self: state.Keeper, run: Run, left: list[int] = left) -> None:
            save(self, run)
            left[0] -= 1
            if not left[0]:
                raise Killed

        monkeypatch.setattr(state.Keeper, "save", killed)
        with pytest.raises(Killed):
            tune_file(open_model(file), cut, *arguments)
        assert not cut.exists()
        assert list(tmp_path.glob(".cut*.tuning.safetensors"))
    monkeypatch.setattr(state.Keeper, "save", save)
    tune_file(open_model(file), cut, *arguments)
    assert not list(tmp_path.glob(".*"))
    pairs = [(whole, cut)] if whole.is_file() else [(each, cut / each.name) for each in sorted(whole.iterdir())]
    for first, second in pairs:
        assert first.read_bytes() == second.read_bytes()


def test_a_state_of_another_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, file = saved("llama", "q4_0", tmp_path)
    monkeypatch.setattr(state, "SECONDS", 0.0)
    monkeypatch.setattr(Run, "_moved", lambda self: 1 / 0)
    out = tmp_path / "out.gguf"
    with pytest.raises(ZeroDivisionError):
        tune_file(open_model(file), out, TRAIN, HELD_OUT, open_model(original), QUICK)
    with pytest.raises(OutputError, match="another text"):
        tune_file(open_model(file), out, TRAIN[1:], HELD_OUT, open_model(original), QUICK)
    (left,) = tmp_path.glob(".out*")
    left.write_bytes(b"torn")
    with pytest.raises(OutputError, match="cannot be read"):
        tune_file(open_model(file), out, TRAIN, HELD_OUT, open_model(original), QUICK)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    original, file = saved("llama", "q4_0", tmp_path)
    with pytest.raises(ModelError, match="not a quantized"):
        tune_file(open_model(original), tmp_path / "out", TRAIN, HELD_OUT, open_model(original), QUICK)
    _, rounded = saved("llama", "w8a8", tmp_path)
    with pytest.raises(ModelError, match="activations"):
        tune_file(open_model(rounded), tmp_path / "out", TRAIN, HELD_OUT, open_model(original), QUICK)
    save_tiny("llama", tmp_path / "other", vocab_size=TOY_VOCAB, hidden_size=32)
    with pytest.raises(ModelError, match="is not of"):
        tune_file(open_model(file), tmp_path / "out", TRAIN, HELD_OUT, open_model(tmp_path / "other"), QUICK)
