"""Fisher information of live models: what files get on the same model and text, and the same codes by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tiny import random_tokens, save_tiny, tiny_model
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit import load
from whit.errors import RecipeError
from whit.live.feedback import feedback
from whit.live.fisher import fisher
from whit.live.modules import QEmbedding
from whit.live.quantize import quantize, twins_of
from whit.live.run import calls_of
from whit.live.twin import Twin
from whit.models.links import Links
from whit.models.model import Model
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.effort import PRESETS, Calibration
from whit.pipeline.fisher import fisher as fisher_of_files
from whit.pipeline.folder import FolderJob
from whit.pipeline.quantize import model_view
from whit.recipes.folders import folder_recipe

WINDOWS = torch.randint(0, TOY_VOCAB, (10, 24), generator=torch.Generator().manual_seed(0))  # more than one batch


def tiny(name: str, folder: Path) -> Model:
    save_tiny(name, folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama" if name == "mixtral" else name, folder)
    return open_model(folder)


def quiet(done: int, total: int, what: str) -> None:
    pass


def products(model: nn.Module) -> dict[str, Twin]:
    """The matrices in blocks, by the names of their parameters."""
    found = {name: each for name, each in model.named_modules() if isinstance(each, Twin) and ".layers." in f".{name}"}
    return found or {
        name: each for name, each in model.named_modules() if isinstance(each, Twin) and ".h." in f".{name}"
    }


def information(model: nn.Module, calls: object) -> dict[str, Tensor]:
    return {name: each.float() for name, each in fisher(model, products(model), calls_of(calls), quiet).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_it_is_what_files_get(name: str, tmp_path: Path) -> None:
    model = tiny(name, tmp_path)
    live = load_module(model)
    quantize(live, "kmeans4")
    found = information(live, WINDOWS)
    view = model_view(model)
    names = [each.name for each in view.tensors if each.name.startswith("blk.") and not each.keep_float]
    links, checked = Links(view), 0
    for key, value in fisher_of_files(model, names, WINDOWS).items():
        links.replace(key, value.float())
    shapes = {key: tuple(value.shape) for key, value in load_module(model).named_parameters()}
    for key in names:
        for parameter, expert in links.slots(key):
            wanted = links.read(parameter, shapes[parameter])
            home, _, last = parameter.rpartition(".")
            twin = home if expert is None else f"{home}.stacks.{last}.{expert}"
            wanted = wanted if expert is None else wanted[expert]
            wanted = wanted.T if products(live)[twin].turned else wanted
            assert torch.allclose(found[twin], wanted, rtol=0.02, atol=1e-4 * float(wanted.max())), twin
            checked += 1
    assert checked >= len(found)


@pytest.mark.parametrize(
    ("weights", "method", "recipe"),
    [
        ("kmeans3", "fisher", "whit-kmeans3"),
        ("kmeans2-g32", "fisher", "whit-kmeans2-g32"),
        ("kl-output3", "nearest", "kl-output-3bit"),
        ("kmeans3", "weighted", "whit-kmeans3"),
        ("kmeans3", "fisher-feedback", "whit-kmeans3"),
    ],
)
def test_codes_are_those_of_files(weights: str, method: str, recipe: str, tmp_path: Path) -> None:
    """Both compute in float32 in another order: some codes between two levels differ, and what is lost does not."""
    model = tiny("llama", tmp_path / "model")
    effort = replace(PRESETS["fast"].effort, rescale=False)  # files fold factors into more than norms
    wanted = folder_recipe(recipe, "fisher" if recipe.startswith("kl") else method)
    assert wanted is not None
    FolderJob(model, wanted).write(tmp_path / "out", calibration=Calibration(WINDOWS, effort=effort))
    file = products(load(tmp_path / "out"))
    live, original = load_module(model), load_module(model)
    if method == "fisher-feedback":
        quantize(live, weights)
        feedback(live, products(live), calls_of(WINDOWS), effort, method=method)
    else:
        quantize(live, weights, method=method, calibration=WINDOWS, exclude=["*embed*", "lm_head"])
    quantize(original, "kmeans3")
    F, found, W = information(original, WINDOWS), products(live), products(original)
    assert found.keys() == file.keys()
    for name in found:
        mine, other = found[name].quantized(), file[name].quantized()
        assert mine.grid == other.grid
        assert (mine.codes == other.codes).float().mean() > (0.9 if "feedback" in method else 0.95), name
        mass = F[name] if method in ("fisher", "nearest") else 1
        losses = [((each.dequantize() - W[name].matrix).square() * mass).sum().item() for each in (mine, other)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05 if "feedback" in method else 0.01), name


def test_it_asks_for_text() -> None:
    for weights, method in (("kl-output4", "nearest"), ("kmeans4", "fisher-feedback")):
        with pytest.raises(RecipeError, match="fisher.*calibration"):
            quantize(tiny_model("llama"), weights, method=method)


def test_rows_of_a_batch_are_windows() -> None:
    ids = torch.tensor([random_tokens(16, seed) for seed in range(3)])
    model = tiny_model("llama")
    quantize(model, "kmeans4")
    one, other = (information(model, each) for each in (ids, [{"input_ids": ids, "attention_mask": ids > 0}]))
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0.02, atol=1e-4 * float(one[name].max())), name
    assert all(each.requires_grad for each in model.parameters())
    assert all(each.grad is None for each in model.parameters())


def test_padding_predicts_nothing() -> None:
    """What stands in it does not matter: labels are drawn for it, and left out."""
    model = tiny_model("llama")
    quantize(model, "kmeans4")
    ids = torch.tensor([random_tokens(16, seed) for seed in range(2)])
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    other = torch.where(mask == 1, ids, (ids + 7) % 256)
    found = [information(model, [{"input_ids": each, "attention_mask": mask}]) for each in (ids, other)]
    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-2), name


def test_a_model_without_blocks_is_known_as_a_whole() -> None:
    """Two classes, one weight per input: F is the mean of x^2 (y - p)^2, and its expectation p (1 - p) x^2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    x = torch.randn(1, 4000, 4)
    calls = [x[:, n : n + 1] for n in range(4000)]
    quantize(model, "kmeans1")
    found = fisher(model, {"0": next(iter(twins_of(model)))}, calls_of(calls[:32]), quiet)["0"].float()
    with torch.no_grad():
        p = (x[:, :32] @ model[0].matrix.T).softmax(-1)[0]
    expected = (p * (1 - p)).T @ x[0, :32].square() / 32
    assert found.shape == (2, 4)
    assert 0.5 < float(found.sum() / expected.sum()) < 2
    quantize(other := nn.Sequential(nn.Linear(64, 8)), "kmeans2", method="fisher", calibration=[torch.randn(1, 50, 64)])
    assert next(iter(twins_of(other))).fixed is not None


def test_embeddings_and_head_are_rounded_too() -> None:
    model = tiny_model("llama-tied-biased")
    report = quantize(model, "kmeans4", method="fisher", calibration=WINDOWS % 256)
    assert all(each.fixed is not None for each in twins_of(model))
    assert any(isinstance(each, QEmbedding) for each in twins_of(model))
    assert "kmeans4" in str(report)
