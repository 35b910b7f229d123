"""The memory of a training, counted from a plan, against the tensors that live while one runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alive import Alive
from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.live.checkpoint import live_model
from whit.models.open import open_model
from whit.pipeline.folder import plan_model, write_model
from whit.products import has_bfloat16
from whit.recipes.folders import folder_recipe
from whit.shape import shape_from_config
from whit.tune.forecast import device_bytes, ram_bytes
from whit.tune.moving import learn
from whit.tune.teacher import Teacher
from whit.tune.train import Run, Tuning

N, LENGTH = 12, 128
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "head_dim": 32}
FEW = {"steps": 2, "block_steps": 2}


@pytest.mark.skipif(not has_bfloat16(), reason="gradients are kept in float32 where nothing multiplies bfloat16")
@pytest.mark.parametrize(
    "tuning", [Tuning(**FEW), Tuning(steps=2, block_steps=0, train="scales")], ids=lambda t: t.train
)
def test_what_is_counted_is_what_lives_while_a_model_is_trained(tuning: Tuning, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", vocab_size=TOY_VOCAB, max_position_embeddings=LENGTH, **SIZES)
    save_toy_tokenizer("llama", tmp_path / "m")
    original, recipe = open_model(tmp_path / "m"), folder_recipe("gptq-4bit-g64", "nearest")
    assert recipe is not None
    plan, _ = plan_model(original, recipe)
    write_model(original, recipe, tmp_path / "q")
    alive, ids = Alive(), torch.tensor(random_tokens(N * LENGTH)).view(N, LENGTH)
    with alive:
        model = live_model(open_model(tmp_path / "q"), torch.float32)
        learners = learn(model, tuning.train, tuning.rank, tuning.seed, tuning.by_blocks(True))
        run = Run(model, learners, ids, 2, tuning)
        run.train(Teacher(live_model(original, torch.float32), run.ids, 2))
    assert device_bytes(original, plan, tuning, N, LENGTH) == pytest.approx(alive.peak, rel=0.2)


def test_memory_grows_with_windows_by_their_hidden_states(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path)
    model, recipe = open_model(tmp_path), folder_recipe("w4a16-g32", "nearest")
    assert recipe is not None
    plan, _ = plan_model(model, recipe)
    few, many = (ram_bytes(model, plan, Tuning(), n, LENGTH) for n in (1000, 2000))
    assert many - few == 2 * 4 * 1000 * LENGTH * shape_from_config(model.config).hidden
    alone = ram_bytes(model, plan, Tuning(train="scales"), 1000, LENGTH, followed=False)
    assert alone < few
    again = ram_bytes(model, plan, Tuning(train="scales", checkpoints=True), 1000, LENGTH, followed=False)
    assert again < alone
