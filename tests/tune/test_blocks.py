"""Blocks that learn from the original's blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny
from whit.live.quantize import quantize, twins_of
from whit.live.types import qint3
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.tune.adam import Adam, Rates
from whit.tune.blocks import Blocks
from whit.tune.moving import borrowers, learn

IDS = torch.tensor([random_tokens(40, seed) for seed in range(24)])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_every_block_gets_nearer_to_the_originals(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path / "model")
    model, teacher = (load_module(open_model(tmp_path / "model")) for _ in range(2))
    quantize(model, weights=qint3)
    own = borrowers(model, learn(model))
    blocks = Blocks(model, teacher, IDS, 4)
    assert blocks.n == len(teacher.get_decoder().layers if kind != "gpt2" else teacher.transformer.h)
    rates = Rates(0.03, 1e-3, 1e-3)
    inside, ratios, moved = [], [], 0
    for index in range(blocks.n):
        mine = blocks.learners(index, own)
        inside += [learner for learner, _ in mine]
        before, after = blocks.train(index, mine, Adam(mine, {}, rates), 24, 8, 0)
        assert 0 < after <= before
        ratios.append(after / before)
        moved += sum(int((learner.codes != learner.quantized().codes).sum()) for learner, _ in mine)
    assert min(ratios) < 0.98
    assert moved > 0
    assert len(inside) == len(set(map(id, inside)))
    assert all(twin.lent is None for twin in twins_of(model))


def test_a_block_that_does_not_get_better_stays(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    model, teacher = (load_module(open_model(tmp_path / "model")) for _ in range(2))
    quantize(model, weights=qint3)
    own = borrowers(model, learn(model))
    before = [learner.quantized().dequantize() for learner, _ in own]
    blocks = Blocks(model, teacher, IDS, 4)
    mine = blocks.learners(0, own)
    first, second = blocks.train(0, mine, Adam(mine, {}, Rates(30.0, 1e-3, 1e-3)), 3, 4, 0)
    assert first == second
    assert all(torch.equal(a, learner.quantized().dequantize()) for a, (learner, _) in zip(before, own, strict=True))


def test_what_goes_on_untrained_is_what_the_model_computes(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    model, teacher = (load_module(open_model(tmp_path / "model")) for _ in range(2))
    blocks = Blocks(model, teacher, IDS, 4)  # nothing is quantized in it
    assert blocks.n == 0
    quantize(model, weights=qint3)
    own = borrowers(model, learn(model))
    blocks = Blocks(model, teacher, IDS, 4)
    for index in range(blocks.n):
        blocks.train(index, blocks.learners(index, own), None, 0, 1, 0)
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS[:2])
    handle.remove()
    ours = torch.cat(blocks._reached[:2])
    assert (ours - seen[0]).norm() < 0.02 * seen[0].norm()  # bfloat16 products beside float32
