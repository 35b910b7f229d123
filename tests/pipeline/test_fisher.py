"""Fisher information against autograd on the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.calibration import labels
from whit.models.links import Links
from whit.models.model import Model
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.effort import Calibration
from whit.pipeline.fisher import fisher
from whit.pipeline.folder import FolderJob
from whit.pipeline.quantize import model_view
from whit.recipes.folders import folder_recipe


def tiny(name: str, folder: Path) -> Model:
    save_tiny(name, folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer({"mixtral": "llama", "gpt_oss": "gpt2"}.get(name, name), folder)
    return open_model(folder)


WINDOWS = torch.randint(0, TOY_VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "gpt_oss"])
def test_it_is_the_mean_square_of_what_autograd_finds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that are drawn the same way, one window after the other, from the same generator."""
    model = tiny(name, tmp_path)
    names = [
        tensor.name for tensor in model_view(model).tensors if tensor.name.startswith("blk.0") and not tensor.keep_float
    ]
    seen: list[torch.Tensor] = []
    drawn = torch.multinomial

    def remembered(p: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
        seen.append(drawn(p, n, generator=generator))
        return seen[-1]

    monkeypatch.setattr(torch, "multinomial", remembered)
    found = fisher(model, names, WINDOWS)
    body = load_module(model).float()
    parameters = {key: value for key, value in body.named_parameters() if value.dim() > 1}
    for value in parameters.values():
        value.requires_grad_()
    squares = {key: torch.zeros_like(value) for key, value in parameters.items()}
    for window, label in zip(WINDOWS, seen, strict=True):
        body.zero_grad()
        log_p = body(window[None]).logits[0].log_softmax(-1)
        log_p.gather(1, label).sum().backward()
        for key, value in parameters.items():
            if value.grad is not None:
                squares[key] += value.grad.square() / len(WINDOWS)
    links = Links(model_view(model))
    for each in names:
        links.replace(each, found[each].float())
    checked = 0
    for each in names:
        for key, expert in links.slots(each):
            got, wanted = links.read(key, tuple(parameters[key].shape)), squares[key]
            got, wanted = (got, wanted) if expert is None else (got[expert], wanted[expert])
            scale = wanted.max()
            assert torch.allclose(got, wanted, rtol=0.02, atol=float(scale) * 1e-4), key
            checked += 1
    assert checked >= 4


def test_only_what_is_asked_for_is_kept_and_seeds_matter(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path)
    name = "blk.0.ffn_down.weight"
    first, again, other = (fisher(model, [name], WINDOWS, seed) for seed in (0, 0, 1))
    assert list(first) == [name]
    assert first[name].dtype == torch.bfloat16
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_batches_add_up_to_a_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, name = tiny("llama", tmp_path), "blk.0.attn_v.weight"
    monkeypatch.setattr(labels, "BATCH", 1)
    apart = [fisher(model, [name], WINDOWS[n : n + 1], n)[name].float() for n in range(3)]
    together = fisher(model, [name], WINDOWS)[name].float()
    assert torch.allclose(together, sum(apart) / 3, rtol=0.03)


@pytest.mark.parametrize("rounding", ["fisher", "fisher-feedback"])
@pytest.mark.parametrize("grid", ["kmeans3", "kmeans2-g32", "kmeans3-tensor", "kmeans3+1%", "int3-asym"])
def test_folders_are_rounded_with_it(grid: str, rounding: str, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "model")
    recipe = folder_recipe(f"whit-{grid}", rounding)
    assert recipe is not None
    result = FolderJob(model, recipe).write(tmp_path / "out", calibration=Calibration(WINDOWS))
    assert result.n_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert torch.isfinite(load_module(open_model(tmp_path / "out"))(WINDOWS[:1]).logits).all()
    if rounding == "fisher-feedback":
        assert sum(each.loss for each in result.losses) < sum(each.plain for each in result.losses)
