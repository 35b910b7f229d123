"""The disk that an unfinished job takes, against what lies there just before it ends; and limits that are kept."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from bench.measure import run

import whit.pipeline.rounder
import whit.pipeline.state
from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.calibration.moments import Moments
from whit.errors import RecipeError
from whit.models.open import open_model
from whit.pipeline.counts import Text
from whit.pipeline.effort import Calibration
from whit.pipeline.forecast import WINDOW, check_ram, ram_bytes, rounding_bytes, state_bytes
from whit.pipeline.quantize import plan_gguf, write_gguf
from whit.pipeline.rounder import Rounder, Task
from whit.recipes.named import recipe_named
from whit.rounding.methods import Effort

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": TOY_VOCAB}


@pytest.mark.parametrize("recipe", ["q4_0", "q4_k_m"])
def test_the_state_takes_what_is_forecast(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "model", **WIDE)
    save_toy_tokenizer("llama", tmp_path / "model")
    model, wanted = open_model(tmp_path / "model"), recipe_named(recipe, "feedback")
    kept: list[int] = []

    def noted(path: Path) -> None:
        kept.append(sum(file.stat().st_size for file in path.iterdir()))
        shutil.rmtree(path)

    monkeypatch.setattr(whit.pipeline.state, "shutil", type("noting", (), {"rmtree": staticmethod(noted)}))
    text = torch.tensor(random_tokens(4 * 32)).view(4, 32)
    write_gguf(model, wanted, tmp_path / "a.gguf", calibration=Calibration(text, 0.0, Effort(sweeps=1)))
    hidden = 4 * text.numel() * WIDE["hidden_size"]  # once: the other copy is there for a moment
    codes = state_bytes(plan_gguf(model, wanted), 1) - 2 * 4 * WINDOW * WIDE["hidden_size"]
    assert kept[0] == pytest.approx(codes + hidden, rel=0.03)


def test_plain_rounding_keeps_nothing(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path)
    assert state_bytes(plan_gguf(open_model(tmp_path), recipe_named("q4_0", "nearest")), 8) == 0


def test_a_limit_is_kept_by_the_process_itself(tmp_path: Path) -> None:
    """Hidden states of 157 MB, for which there is no room; nor is there any for two models side by side."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    save_tiny("llama", tmp_path / "m", vocab_size=TOY_VOCAB, max_position_embeddings=WINDOW, **sizes)
    save_toy_tokenizer("llama", tmp_path / "m")
    plan = plan_gguf(open_model(tmp_path / "m"), recipe_named("q4_0", "gptq"))
    windows, limit = 300, 540_000_000
    assert rounding_bytes(open_model(tmp_path / "m"), plan, windows) > 1.15 * limit
    whit = Path(sys.executable).with_name("whit")
    options = ("--preset", "fast", "--windows", str(windows), "--ram", str(limit), "-o", tmp_path / "a.gguf")
    done = run(whit, "quantize", tmp_path / "m", "--recipe", "q4_0", "--rounding", "gptq", *options)
    assert f"{windows} windows" in done.output
    assert done.peak_bytes < limit
    assert "--ram allows 540 MB" in done.output
    assert "tensors are what was to be written" in done.output


def test_what_cannot_be_kept_is_said_with_what_could(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path)
    model = open_model(tmp_path)
    text, nearest = Text(48, 64, sampled=(64,)), plan_gguf(model, recipe_named("q4_0", "nearest"))
    gptq = plan_gguf(model, recipe_named("q4_0", "gptq"))
    least = int(rounding_bytes(model, gptq, 0)) + 1
    check_ram(model, gptq, Text(48, 64), True, least + 10**6)
    with pytest.raises(RecipeError, match="the whole model writes a part of the text.*Give a text with --calib"):
        check_ram(model, gptq, text, True, least)
    check_ram(model, nearest, text, False, int(rounding_bytes(model, nearest, 0)) + 1)
    with pytest.raises(RecipeError, match="for its largest tensors"):
        check_ram(model, nearest, text, False, 10**6)
    with pytest.raises(RecipeError, match="reading the result again.*--no-verify leaves it out"):
        check_ram(model, nearest, text, True, int(rounding_bytes(model, nearest, 0)) + 1)


def test_with_a_limit_hidden_states_are_taken_to_be_on_disk(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path)
    model = open_model(tmp_path)
    plan, text = plan_gguf(model, recipe_named("q4_0", "gptq")), Text(10_000, WINDOW)
    limit = int(rounding_bytes(model, plan, 0)) + 10**6
    assert ram_bytes(model, plan, text, None) > 2 * limit
    assert ram_bytes(model, plan, text, None, limit) < limit


def test_factors_of_experts_are_dropped_with_the_last_that_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of experts would else hold one for each of them until its end."""
    save_tiny("mixtral", tmp_path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path)
    steps = {s.tensor.name: s for s in plan_gguf(open_model(tmp_path), recipe_named("q4_0", "gptq")).steps}
    gate, up, down = (steps[f"blk.0.ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))

    def seen(cols: int) -> list[Moments]:
        return [Moments.of_importance(torch.ones(cols), 100) for _ in range(4)]

    both, alone = seen(gate.tensor.shape[-1]), seen(down.tensor.shape[-1])
    monkeypatch.setattr(whit.pipeline.rounder, "BATCH", 1)  # one matrix at a time
    rounder = Rounder(Effort(sweeps=0))
    tasks = [Task(gate, both), Task(down, alone), Task(up, both)]
    factored = [len(rounder._curved) for _ in rounder.rounded(tasks)]
    assert factored == [1, 2, 3, 4, *[5] * 4, 4, 3, 2, 1]  # `up` reads what `gate` did, nothing else what `down` does
    assert not rounder._curved
