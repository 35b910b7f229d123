"""Training a live model that has been quantized in memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny, tiny_model
from whit.errors import ModelError, RecipeError, TextError
from whit.live.quantize import freeze, quantize, twins_of
from whit.live.types import qint2, qint4
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.tune.moving import learn, settle
from whit.tune.train import Tuning, train

WINDOWS = torch.tensor([random_tokens(32, seed) for seed in range(80)])
QUICK = Tuning(
    steps=12, batch=8, at_once=8, block_steps=20, block_batch=8, rate=0.03, scale_rate=0.003, vector_rate=0.003
)


def pair(kind: str, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    save_tiny(kind, folder / "model")
    return load_module(open_model(folder / "model")), load_module(open_model(folder / "model"))


@pytest.mark.parametrize("kind", ["llama-tied-biased", "gpt2", "mixtral"])
def test_it_follows_the_teacher_and_freezes_to_what_it_saw(kind: str, tmp_path: Path) -> None:
    model, teacher = pair(kind, tmp_path)
    quantize(model, weights=qint4)
    said: list[str] = []
    found = train(model, WINDOWS, teacher, tuning=QUICK, progress=lambda done, total, what: said.append(what))
    assert 0 < found.after < found.before
    assert found.moved > 0
    assert any("loss" in what for what in said)
    with torch.no_grad():
        seen = model(WINDOWS[:2]).logits
        freeze(model)
        assert torch.allclose(model(WINDOWS[:2]).logits, seen, rtol=1e-3, atol=1e-4)


def test_a_frozen_model_can_be_trained_again(tmp_path: Path) -> None:
    model, teacher = pair("llama-tied-biased", tmp_path)
    quantize(model, weights=qint2)
    with torch.no_grad():
        before = model(WINDOWS[:2]).logits
        freeze(model)
        learners = learn(model, "full")
        assert torch.allclose(model(WINDOWS[:2]).logits, before, rtol=1e-3, atol=1e-4)
        settle(model)
        assert torch.allclose(model(WINDOWS[:2]).logits, before, rtol=1e-3, atol=1e-4)
    twins = list(twins_of(model))
    assert len(learners) < len(twins)  # the head is tied to the embedding
    found = train(model, WINDOWS, teacher, tuning=QUICK)
    assert found.after < found.before
    freeze(model)


def test_what_is_learned_is_not_written_to_a_tied_layer_in_float(tmp_path: Path) -> None:
    model, _ = pair("llama-tied-biased", tmp_path)
    quantize(model, weights=qint2, exclude="*embed*")
    before = model.model.embed_tokens.weight.detach().clone()
    learn(model, "full")
    settle(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not torch.equal(model.lm_head.weight, before)


def test_codes_that_are_trained_from_end_to_end(tmp_path: Path) -> None:
    model, teacher = pair("llama", tmp_path)
    quantize(model, weights=qint4)
    settings = Tuning(steps=40, batch=16, at_once=16, block_steps=0, rate=0.01, scale_rate=0.003, vector_rate=0.003)
    found = train(model, WINDOWS, teacher, tuning=settings)
    assert found.blocks == 0
    assert found.after < found.before
    assert found.moved > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpoints_change_nothing_but_memory(kind: str, tmp_path: Path) -> None:
    results = []
    for checkpoints in (False, True):
        model, teacher = pair(kind, tmp_path / str(checkpoints))
        quantize(model, weights=qint4)
        model.train()  # GPT-2 drops a tenth of its activations then
        tuning = Tuning(steps=6, batch=4, at_once=4, block_steps=3, checkpoints=checkpoints)
        train(model, WINDOWS, teacher, tuning=tuning)
        assert all(each.training for each in model.modules())
        assert not any(getattr(each, "gradient_checkpointing", False) for each in model.modules())
        results.append([each.quantized().dequantize() for each in twins_of(model)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_it_stops_when_the_minutes_are_over(tmp_path: Path) -> None:
    model, teacher = pair("llama", tmp_path)
    quantize(model, weights=qint4)
    said: list[str] = []
    tuning = Tuning(steps=50, batch=4, block_steps=3, minutes=0.0)
    found = train(model, WINDOWS, teacher, tuning=tuning, progress=lambda done, total, what: said.append(what))
    assert found.steps <= 1
    assert found.blocks == 0
    assert not any("block 0" in what for what in said)


def test_the_same_seed_gives_the_same_codes(tmp_path: Path) -> None:
    results = []
    for n, seed in enumerate((0, 0, 1)):
        model, teacher = pair("llama", tmp_path / str(n))
        quantize(model, weights=qint4)
        train(model, WINDOWS, teacher, tuning=Tuning(steps=8, batch=4, block_steps=3, scale_rate=0.01, seed=seed))
        results.append(torch.cat([each.quantized().dequantize().flatten() for each in twins_of(model)]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model, teacher = pair("llama", tmp_path)
    with pytest.raises(ModelError, match="quantize"):
        train(model, WINDOWS, teacher)
    quantize(model, weights=qint4)
    with pytest.raises(RecipeError, match="Known: scales"):
        train(model, WINDOWS, teacher, tuning=Tuning(train="everything"))
    with pytest.raises(TextError, match="too few"):
        train(model, WINDOWS[:3], teacher)
    with pytest.raises(RecipeError, match="at least one step"):
        Tuning(steps=0)
    with pytest.raises(TextError, match="2 tokens"):
        train(model, WINDOWS[:, :1])
    with pytest.raises(TextError, match="found torch.float32"):
        train(model, WINDOWS.float())
    with pytest.raises(TextError, match="found a list"):
        train(model, WINDOWS.tolist())  # type: ignore[arg-type]
    with pytest.raises(TextError, match="32 tokens.*12"):
        train(model, WINDOWS, teacher, held_out=WINDOWS[:4, :12])
    with pytest.raises(ModelError, match="itself"):
        train(model, WINDOWS, model)
    with pytest.raises(ModelError, match="300.*256.*same vocabulary"):
        train(model, WINDOWS, tiny_model("llama", vocab_size=300))
    with pytest.raises(ModelError, match="float64"):
        train(copy.deepcopy(model).double(), WINDOWS)
    learn(model)
    with pytest.raises(ModelError, match="already"):
        train(model, WINDOWS, teacher)


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_sixteen_bits(dtype: torch.dtype, units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With units for bfloat16 and without."""
    monkeypatch.setattr("whit.tune.halves.has_bfloat16", lambda: units)
    for own in (torch.float32, dtype):
        model, teacher = tiny_model("llama").to(own), tiny_model("llama").to(dtype)
        quantize(model, weights=qint2)
        found = train(model, WINDOWS[:24], teacher, tuning=replace(QUICK, block_steps=10))
        assert 0 < found.after < found.before


@pytest.mark.parametrize("frozen", [False, True])
def test_what_wanted_gradients_wants_them_again_afterwards(frozen: bool, tmp_path: Path) -> None:
    """Any other training can go on; what somebody keeps still stays still."""
    model, teacher = pair("llama-tied-biased", tmp_path)
    model.requires_grad_(True)
    model.get_parameter("model.norm.weight").requires_grad_(False)
    quantize(model, weights=qint4)
    if frozen:
        freeze(model)
    train(model, WINDOWS[:8], teacher, tuning=Tuning(steps=2, block_steps=2))
    assert {name for name, each in model.named_parameters() if not each.requires_grad} == {"model.norm.weight"}
    ids = WINDOWS[:1]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)
