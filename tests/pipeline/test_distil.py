"""Gradients against finite differences, and what distillation may and may not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile
from whit.devices import CPU
from whit.errors import ModelError
from whit.layouts.ggml import GGML_TYPES
from whit.models.open import open_model
from whit.pipeline import distil
from whit.pipeline.distil import Training, distil_folder, distil_gguf
from whit.pipeline.folder import FolderJob
from whit.pipeline.quantize import write_gguf
from whit.pipeline.stored import stored_of
from whit.pipeline.student import WHOLE
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named

WINDOWS = torch.tensor([random_tokens(64, seed) for seed in range(12)])
HELD_OUT, TRAIN = WINDOWS[:4], WINDOWS[4:]


def saved(kind: str, folder: Path, recipe: str = "q4_0", **changes: object) -> tuple[Path, Path]:
    save_tiny(kind, folder / "model", vocab_size=TOY_VOCAB, **changes)
    save_toy_tokenizer("gpt2" if kind in ("gpt2", "opt") else "llama", folder / "model")
    write_gguf(open_model(folder / "model"), recipe_named(recipe), folder / "a.gguf")
    return folder / "model", folder / "a.gguf"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_gradients_are_those_of_finite_differences(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "has_bfloat16", lambda: False)
    original, file = saved(kind, tmp_path)
    run = distil._Run(open_model(original), open_model(file), TRAIN, HELD_OUT, Training(), lambda *_: None, CPU)
    run._gradients(range(len(HELD_OUT)))
    step = 1e-2  # wide: scales are rounded to float16
    checked = 0
    for name, key, moving in run.student._all():
        direction = moving.gradient.sign()  # along which the loss changes most
        told = (moving.gradient * direction).sum().item()
        ends = []
        for sign in (1, -1):
            moving.own.u.copy_(sign * step * direction)
            ends.append(run._held_out("").mean().item())
            moving.own.u.zero_()
        found = (ends[0] - ends[1]) / (2 * step)
        assert told == pytest.approx(found, rel=0.1, abs=1e-4), f"{name} {key}"
        checked += 1
    assert checked > 15
    assert any(key == WHOLE for _, key, _ in run.student._all())


def test_the_divergence_falls_and_codes_and_size_stay(tmp_path: Path) -> None:
    original, file = saved("gpt2", tmp_path)
    out = tmp_path / "b.gguf"
    found = distil_gguf(open_model(original), open_model(file), out, TRAIN, HELD_OUT, Training(steps=40, batch=4))
    assert found.steps > 0
    assert found.after < 0.7 * found.before  # 0.4 when this was written
    before, after = GGUFFile(file), GGUFFile(out)
    assert before.n_bytes == after.n_bytes
    assert before.metadata == after.metadata
    moved = 0
    for name in before.names():
        kind = GGML_TYPES[before.info(name).dtype]
        shape = (torch.Size(before.info(name).shape[:-1]).numel(), before.info(name).shape[-1])
        first, second = kind.unpack(before.raw(name), shape), kind.unpack(after.raw(name), shape)
        if kind.fields:
            assert torch.equal(first.codes, second.codes)
            change = (second.params["scale"].float() / first.params["scale"].float() - 1).abs()
            assert change.nan_to_num().max() < 0.11
            moved += int(change.max() > 0)
    assert moved > 4


def test_nothing_changes_when_nothing_gets_better(tmp_path: Path) -> None:
    original, file = saved("llama", tmp_path, "q8_0")
    out = tmp_path / "b.gguf"
    training = Training(steps=2, rate=5.0)  # far too fast
    found = distil_gguf(open_model(original), open_model(file), out, TRAIN, HELD_OUT, training)
    assert found.steps == 0
    assert found.after == found.before
    assert file.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("recipe", ["q4_k_m", "q2_k", "iq2_xs", "iq4_xs", "q5_1"])
def test_every_layout_with_float_scales(recipe: str, tmp_path: Path) -> None:
    original, file = saved("llama", tmp_path, recipe, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    training = Training(steps=10, batch=4, rate=3e-3)
    found = distil_gguf(open_model(original), open_model(file), tmp_path / "b.gguf", TRAIN, TRAIN, training)
    assert found.steps > 0
    assert found.after < found.before


def test_time_is_kept(tmp_path: Path) -> None:
    original, file = saved("llama", tmp_path)
    told: list[str] = []
    training = Training(steps=1000, minutes=0.0)
    distil_gguf(
        open_model(original),
        open_model(file),
        tmp_path / "b.gguf",
        TRAIN,
        HELD_OUT,
        training,
        progress=lambda done, total, what: told.append(f"{done} of {total}"),
    )
    assert "1 of 1000" in told
    assert "2 of 1000" not in told


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    original, file = saved("gpt2", tmp_path)
    for out in ("b.gguf", "c.gguf"):
        distil_gguf(open_model(original), open_model(file), tmp_path / out, TRAIN, HELD_OUT, Training(steps=6))
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    original, _ = saved("llama", tmp_path)
    with pytest.raises(ModelError, match="not a quantized file"):
        distil_gguf(open_model(original), open_model(original), tmp_path / "b.gguf", TRAIN, HELD_OUT)
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize("recipe", ["f16", "bf16"])
def test_floats_of_sixteen_bits_stay_as_they_are(recipe: str, tmp_path: Path) -> None:
    original, file = saved("llama", tmp_path, recipe)
    found = distil_gguf(open_model(original), open_model(file), tmp_path / "b.gguf", TRAIN, HELD_OUT, Training(1))
    assert found.before >= 0


def test_a_file_of_another_model_is_refused_by_its_header(tmp_path: Path) -> None:
    _, file = saved("llama", tmp_path)
    save_tiny("gpt2", tmp_path / "other", vocab_size=TOY_VOCAB)
    with pytest.raises(ModelError, match="is not of"):
        distil_gguf(open_model(tmp_path / "other"), open_model(file), tmp_path / "b.gguf", TRAIN, HELD_OUT)


@pytest.mark.parametrize("kind", ["gptq-4bit-g32", "awq-4bit-g32", "w3a16-g32", "whit-int3-g64"])
def test_folders_keep_their_format_their_codes_and_their_size(kind: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    recipe = folder_recipe(kind)
    assert recipe is not None
    FolderJob(open_model(tmp_path / "model"), recipe).write(tmp_path / "a")
    original, before = open_model(tmp_path / "model"), open_model(tmp_path / "a")
    found = distil_folder(original, before, tmp_path / "b", TRAIN, HELD_OUT, Training(steps=40, batch=4))
    assert found.steps > 0
    assert found.after < found.before
    after = open_model(tmp_path / "b")
    assert after.quantization == before.quantization
    assert after.n_bytes == before.n_bytes
    one, other, moved = stored_of(before), stored_of(after), 0
    for name in one.names():
        for A, B in zip(one.matrices(name) or (), other.matrices(name) or (), strict=True):
            assert A.grid == B.grid
            assert torch.equal(A.codes, B.codes)
            moved += not torch.equal(A.params["scale"], B.params["scale"])
    assert moved > 5


def test_quantized_activations_are_not_followed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", vocab_size=TOY_VOCAB)
    recipe = folder_recipe("w8a8")
    assert recipe is not None
    FolderJob(open_model(tmp_path / "model"), recipe).write(tmp_path / "a")
    with pytest.raises(ModelError, match="activations are quantized too"):
        distil_folder(open_model(tmp_path / "model"), open_model(tmp_path / "a"), tmp_path / "b", TRAIN, HELD_OUT)
