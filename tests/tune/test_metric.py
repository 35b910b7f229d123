"""What an error in a hidden state does to predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import random_tokens, save_tiny
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.tune.halves import Halves
from whit.tune.metric import metrics

IDS = torch.tensor([random_tokens(32, seed) for seed in range(32)])


def _blocks(model: Any) -> nn.ModuleList:
    found = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    assert isinstance(found, nn.ModuleList)
    return found


def _divergence(model: nn.Module, block: nn.Module, direction: Tensor, size: float) -> float:
    """Mean KL over tokens when the block's output is off by +-size along a direction, signs drawn per token."""
    signs = torch.randint(0, 2, (*IDS.shape, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1

    def hook(_: nn.Module, args: Any, out: Any) -> Any:
        first = (out[0] if isinstance(out, tuple) else out) + size * signs * direction
        return (first, *out[1:]) if isinstance(out, tuple) else first

    with torch.no_grad():
        log_p = model(IDS).logits.double().log_softmax(-1)
        handle = block.register_forward_hook(hook)
        log_q = model(IDS).logits.double().log_softmax(-1)
        handle.remove()
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_divergence_of_a_direction_is_what_the_metric_says(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path / "model")
    model = load_module(open_model(tmp_path / "model"))
    found = metrics(Halves(model), list(_blocks(model)), IDS)
    for index, M in enumerate(found):
        assert M.diagonal().mean() == pytest.approx(1, rel=1e-5)
        values, vectors = torch.linalg.eigh(M)
        assert values[0] > -1e-3 * values[-1]
        sizes = [values[-1].item(), values[len(M) // 2].item()]
        hurts = [_divergence(model, _blocks(model)[index], vectors[:, n], 0.02) for n in (-1, len(M) // 2)]
        assert hurts[0] / hurts[1] == pytest.approx(sizes[0] / sizes[1], rel=0.6)
        assert hurts[0] > 2 * hurts[1]


def test_the_same_seed_draws_the_same_and_nothing_stays(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    model = load_module(open_model(tmp_path / "model"))
    halves, blocks = Halves(model), list(_blocks(model))
    one, same, other = (metrics(halves, blocks, IDS[:4], seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert all(each.grad is None for each in model.parameters())
    assert not any(block._forward_hooks for block in blocks)
