"""Losses in pieces, and their gradients, against torch's own on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tiny import random_tokens, save_tiny
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.tune import halves as module_of_halves
from whit.tune import losses as module
from whit.tune.halves import Halves
from whit.tune.losses import backward, divergence, losses

IDS = torch.tensor([random_tokens(20, seed) for seed in range(3)])


@pytest.fixture
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("models")
    made = []
    for seed, kind in enumerate(("gemma2", "llama")):  # the first caps its logits
        save_tiny(kind, folder / kind)
        made.append(load_module(open_model(folder / kind)))
        made[seed].requires_grad_(True)
    return made[0], made[1]


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_they_are_torchs_own(
    models: tuple[torch.nn.Module, torch.nn.Module], taught: bool, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 7)  # does not divide the windows
    student, teacher = models[which], models[1 - which]
    with torch.no_grad():
        wanted = teacher(IDS).logits
    halves = Halves(student)
    names = [name for name, _ in student.named_parameters()]
    logits = student(IDS).logits
    if taught:
        loss = functional.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
        each = loss.sum(-1).flatten()
    else:
        flat = logits[:, :-1].flatten(0, 1)
        each = functional.cross_entropy(flat, IDS[:, 1:].flatten(), reduction="none")
    expected = torch.autograd.grad(each.mean(), list(student.parameters()))
    follow = (lambda window, part: wanted[window, part]) if taught else None
    monkeypatch.setattr(module_of_halves, "has_bfloat16", lambda: False)
    found = losses(halves, halves.hidden(IDS), [0, 1, 2], IDS, follow)
    assert torch.allclose(found.float(), each.detach(), rtol=1e-3, atol=1e-5)
    mean = backward(halves, halves.hidden(IDS), [0, 1, 2], IDS, follow, 0.5)
    assert mean == pytest.approx(each.mean().item(), rel=1e-3)
    for name, parameter, gradient in zip(names, student.parameters(), expected, strict=True):
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, 0.5 * gradient, rtol=1e-2, atol=1e-5 * gradient.abs().max() + 1e-7), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_of_whole_logits_is_torchs_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 7)
    generator = torch.Generator().manual_seed(0)
    logits, wanted = ((3 * torch.randn(20, 50, generator=generator)).to(dtype).requires_grad_() for _ in range(2))
    found = divergence(logits, wanted)
    (gradient,) = torch.autograd.grad(2 * found, logits)
    log_q, log_p = logits.float().log_softmax(-1), wanted.detach().float().log_softmax(-1)
    expected = functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    (right,) = torch.autograd.grad(2 * expected, logits)
    assert torch.allclose(gradient, right, rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)


def test_a_model_without_halves_is_called_whole() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(300, 300)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids)

    model = Plain()
    halves = Halves(model)
    backward(halves, halves.hidden(IDS), [0, 1, 2], IDS, None)
    found = model.table.weight.grad
    loss = functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    (expected,) = torch.autograd.grad(loss, [model.table.weight])
    assert found is not None
    assert torch.allclose(found, expected, atol=1e-6)
