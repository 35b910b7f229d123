"""transformers' own Trainer on quantized models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tiny import random_tokens, save_tiny
from whit.errors import ModelError, RecipeError
from whit.live.quantize import freeze, quantize, twins_of
from whit.live.run import calls_of, divergence, log_probabilities
from whit.live.types import qint2, qint4
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.tune.trainer import QuantizedTraining

DATA = [{"input_ids": ids, "labels": ids} for ids in (random_tokens(32, seed % 4) for seed in range(64))]


def model_of(folder: Path, kind: str = "llama", method: str = "nearest") -> torch.nn.Module:
    if not folder.exists():
        save_tiny(kind, folder)
    model = load_module(open_model(folder))
    quantize(model, weights=qint4, method=method)
    return model


def trained(model: torch.nn.Module, out: Path, steps: int, resume: bool = False, **callback: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        save_steps=10,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        seed=1,
    )

    class Cut(QuantizedTraining):
        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            if state.global_step == steps:  # type: ignore[attr-defined]
                control.should_training_stop = True  # type: ignore[attr-defined]

    trainer = Trainer(model, arguments, train_dataset=DATA, callbacks=[Cut(**callback)])  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def codes(model: torch.nn.Module) -> list[torch.Tensor]:
    return [twin.quantized().codes for twin in twins_of(model)]


@pytest.mark.parametrize("train", ["full", "lora", "scales"])
def test_the_loss_falls_and_what_was_seen_is_what_is_frozen(train: str, tmp_path: Path) -> None:
    model = model_of(tmp_path / "model")
    before = codes(model)
    trainer = trained(model, tmp_path / "out", 20, train=train)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - (0.1 if train == "full" else 0.02)
    moved = any(not torch.equal(a, b) for a, b in zip(before, codes(model), strict=True))
    assert moved == (train != "scales")
    ids = torch.tensor([random_tokens(16)])
    model.eval()
    with torch.no_grad():
        seen = model(ids).logits
        freeze(model)
        assert torch.allclose(model(ids).logits, seen, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["nearest", "search"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-tied"])
def test_it_resumes_from_its_checkpoint(kind: str, method: str, tmp_path: Path) -> None:
    """A tied head's checkpoint holds what both learn once, and resumes both."""
    whole = model_of(tmp_path / "model", kind, method)
    start = codes(whole)
    trained(whole, tmp_path / "whole", 20)
    trained(model_of(tmp_path / "model", kind, method), tmp_path / "cut", 10)
    resumed = model_of(tmp_path / "model", kind, method)
    trained(resumed, tmp_path / "cut", 20, resume=True)
    for first, second in zip(codes(whole), codes(resumed), strict=True):
        assert torch.equal(first, second)
    assert any(not torch.equal(first, second) for first, second in zip(start, codes(resumed), strict=True))


HELD = torch.tensor([random_tokens(32, 100 + seed) for seed in range(8)])


def taught(folder: Path, teacher: torch.nn.Module, data: list[dict[str, list[int]]], **options: object) -> Trainer:
    """A two-bit model that follows `teacher`, with its Trainer."""
    model = load_module(open_model(folder))
    quantize(model, weights=qint2)
    share = float(options.pop("next_token", 0.0))  # type: ignore[arg-type]
    arguments = TrainingArguments(
        **{  # type: ignore[arg-type]
            "output_dir": str(folder / "out"),
            "max_steps": 30,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.03,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "seed": 1,
            **options,
        }
    )
    callback = QuantizedTraining(teacher=teacher, next_token=share)
    evaluated = [{"input_ids": ids, "labels": ids} for ids in HELD.tolist()]
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=evaluated, callbacks=[callback])
    trainer.train()
    return trainer


FRESH = [{"input_ids": ids, "labels": ids} for ids in (random_tokens(32, seed) for seed in range(64))]


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_teacher_is_followed_on_text_that_was_not_trained_on(bf16: bool, tmp_path: Path) -> None:
    """Measured from outside, with the model frozen; and the Trainer's own evaluation says the same."""
    folder = tmp_path / "model"
    save_tiny("llama", folder)
    teacher, start = load_module(open_model(folder)), load_module(open_model(folder))
    calls = calls_of(HELD)
    reference = log_probabilities(teacher, calls)
    quantize(start, weights=qint2)
    before = divergence(start.eval(), calls, reference)
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    trainer = taught(folder, teacher, FRESH, bf16=bf16, eval_strategy="steps", eval_steps=30, **options)
    model = trainer.model
    freeze(model)
    after = divergence(model.eval(), calls, reference)
    assert after < 0.8 * before
    one = calls_of(HELD[:, :-1])  # the last token of a window has no label
    shorter = divergence(model, one, log_probabilities(teacher, one))
    assert logged(trainer, "eval_loss")[-1] == pytest.approx(shorter, rel=0.1 if bf16 else 2e-3)
    assert not model._forward_hooks


def test_steps_in_parts_are_the_same_steps(tmp_path: Path) -> None:
    """Windows of which different shares count: the mean is over tokens of the whole step, not over parts."""
    save_tiny("llama", tmp_path)
    data = [{**each, "labels": [-100] * (n % 4 * 7) + each["labels"][n % 4 * 7 :]} for n, each in enumerate(FRESH)]
    found = []
    for at_once, parts in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": parts, "max_steps": 4}
        found.append(logged(taught(tmp_path, load_module(open_model(tmp_path)), data, **options), "loss"))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_the_next_token_is_mixed_in_by_its_share(tmp_path: Path) -> None:
    """The first step's loss is linear in the share; at 0 and 1 it is what is measured from outside."""
    save_tiny("llama", tmp_path)
    teacher = load_module(open_model(tmp_path))
    options = {"max_steps": 1, "per_device_train_batch_size": 64, "logging_steps": 1}
    losses = [
        logged(taught(tmp_path, teacher, FRESH, next_token=share, **options), "loss")[0] for share in (0, 0.25, 1)
    ]
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-3)
    student = load_module(open_model(tmp_path))
    quantize(student, weights=qint2)
    ids = torch.tensor([each["input_ids"] for each in FRESH])
    calls = calls_of(ids[:, :-1])
    assert losses[0] == pytest.approx(divergence(student, calls, log_probabilities(teacher, calls)), rel=1e-3)
    with torch.no_grad():
        assert losses[2] == pytest.approx(student(input_ids=ids, labels=ids).loss.item(), rel=1e-3)


def test_teachers_that_are_none_are_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "a")
    save_tiny("llama", tmp_path / "b", vocab_size=300)
    with pytest.raises(ModelError, match="same vocabulary"):
        taught(tmp_path / "a", load_module(open_model(tmp_path / "b")), FRESH)
    with pytest.raises(ModelError, match="quantized itself"):
        taught(tmp_path / "a", model_of(tmp_path / "a"), FRESH)
    with pytest.raises(RecipeError, match="Smoothed"):
        taught(tmp_path / "a", load_module(open_model(tmp_path / "a")), FRESH, label_smoothing_factor=0.1)
    with pytest.raises(RecipeError, match="from 0 to 1"):
        QuantizedTraining(next_token=1.5)


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(ModelError, match="quantize"):
        trained(load_module(open_model(tmp_path / "model")), tmp_path / "out", 1)


def test_scales_that_were_chosen_before_are_saved_in_checkpoints(tmp_path: Path) -> None:
    """transformers refuses files in which two names share a tensor."""
    save_tiny("llama", tmp_path / "model")
    model = load_module(open_model(tmp_path / "model"))
    quantize(model, weights=qint4, method="search")
    trained(model, tmp_path / "out", 10)
    assert (tmp_path / "out" / "checkpoint-10").is_dir()


def test_a_second_training_takes_another_trainer(tmp_path: Path) -> None:
    """The first one's optimizer holds what has been settled; a new Trainer finds the model as the first one did."""
    model = model_of(tmp_path / "model")
    first = trained(model, tmp_path / "out", 2)
    with pytest.raises(ModelError, match="new Trainer"):
        first.train()
    before = codes(model)
    trained(model, tmp_path / "more", 20)
    assert any(not torch.equal(a, b) for a, b in zip(before, codes(model), strict=True))
