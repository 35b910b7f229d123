"""transformers' own Trainer on quantized models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tiny import random_tokens, save_tiny
from whit.errors import ModelError
from whit.live.quantize import freeze, quantize, twins_of
from whit.live.types import qint4
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.tune.trainer import QuantizedTraining

DATA = [{"input_ids": ids, "labels": ids} for ids in (random_tokens(32, seed % 4) for seed in range(64))]


def model_of(folder: Path) -> torch.nn.Module:
    if not folder.exists():
        save_tiny("llama", folder)
    model = load_module(open_model(folder))
    quantize(model, weights=qint4)
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


def test_it_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    whole = model_of(tmp_path / "model")
    trained(whole, tmp_path / "whole", 20)
    trained(model_of(tmp_path / "model"), tmp_path / "cut", 10)
    resumed = model_of(tmp_path / "model")
    trained(resumed, tmp_path / "cut", 20, resume=True)
    for first, second in zip(codes(whole), codes(resumed), strict=True):
        assert torch.equal(first, second)


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(ModelError, match="quantize"):
        trained(load_module(open_model(tmp_path / "model")), tmp_path / "out", 1)
