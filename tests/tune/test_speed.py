"""What a training is reckoned to do, against what one does; and that all of it can be timed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import whit.tune.blocks
from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.models.open import open_model
from whit.pipeline.folder import plan_model, write_model
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.tune.blocks import Blocks
from whit.tune.files import tune_file
from whit.tune.speed import BLOCK, DRAWN, END, FOLLOW, LOOK, METRIC, tuning_laws, tuning_work
from whit.tune.train import Run, Tuning

N, HELD, LENGTH, DEPTH = 6, 2, 32, 2
TUNING = Tuning(steps=5, block_steps=3)


def test_counts_are_those_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "m", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "m")
    original, recipe = open_model(tmp_path / "m"), folder_recipe("gptq-4bit-g32", "nearest")
    assert recipe is not None
    plan, _ = plan_model(original, recipe)
    write_model(original, recipe, tmp_path / "q")
    work = tuning_work(plan, TUNING, N, HELD, resampled=0)
    seen: Counter[str] = Counter()

    def counted(owner: Any, name: str, kind: str, amount: Any = lambda *given: 1) -> None:
        inner = getattr(owner, name)

        def outer(*given: Any) -> Any:
            seen[kind] += amount(*given)
            return inner(*given)

        monkeypatch.setattr(owner, name, outer)

    counted(Run, "advance", END)
    counted(Run, "held_out", LOOK, lambda run, teacher: HELD)
    counted(Blocks, "_gradients", BLOCK)
    counted(Blocks, "_loss", FOLLOW, lambda *given: HELD)
    counted(Blocks, "_called", FOLLOW, lambda blocks, block, whose, index, hidden: len(hidden))
    counted(whit.tune.blocks, "metrics", METRIC, lambda halves, blocks, ids, seed: len(ids))
    ids = torch.tensor(random_tokens((N + HELD) * LENGTH)).view(N + HELD, LENGTH)
    tune_file(open_model(tmp_path / "q"), tmp_path / "out", ids[HELD:], ids[:HELD], original, TUNING)
    assert {kind: work.count(kind) for kind in (END, LOOK, METRIC)} == {
        kind: seen[kind] for kind in (END, LOOK, METRIC)
    }
    # these are laws of one block: rows are the blocks
    assert {kind: work.rows(kind) for kind in (BLOCK, FOLLOW)} == {kind: seen[kind] for kind in (BLOCK, FOLLOW)}


@pytest.mark.parametrize("recipe", ["gptq-3bit-g32", "q4_0"])
def test_everything_can_be_timed_and_takes_something(recipe: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path)
    model = open_model(tmp_path)
    plan, _ = plan_model(model, folder_recipe(recipe, "nearest") or recipe_named(recipe, "nearest"))
    laws = tuning_laws(model, plan, TUNING, LENGTH, resampled=1)
    assert all(laws[kind](DEPTH, 1).wall > 0 for kind in (END, LOOK, FOLLOW))
    assert all(laws[kind](DEPTH, 1).wall >= 0 for kind in (BLOCK, METRIC, DRAWN))
    assert laws[END](2 * DEPTH, 1).wall >= laws[END](DEPTH, 1).wall
    parts = tuning_work(plan, TUNING, N, HELD, resampled=1).cost(laws, 1)
    assert {"reading", "text drawn anew", "blocks", "other text", "steps from end to end"} == set(parts)
