"""Channels in float beside a matrix on a grid: which ones, what is gained, and that nothing of a live model is lost."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import random_tokens, tiny_model
from whit.errors import RecipeError
from whit.live.calibrate import calibrate
from whit.live.quantize import freeze, n_bytes, quantize
from whit.live.run import calls_of
from whit.live.salient import Beside, squares_of
from whit.live.save import load, save
from whit.live.types import qint4

TOKENS = torch.tensor([random_tokens(24)])
TEXT = torch.tensor([random_tokens(24, seed) for seed in range(1, 5)])
OUTLIERS = (3, 40)


def layer() -> nn.Sequential:
    """Sixty-four inputs of which two stick out in what arrives and in the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight[:, OUTLIERS] *= 8
    return model


def inputs(seed: int) -> Tensor:
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(seed))
    x[:, OUTLIERS] *= 10
    return x


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def besides(model: nn.Module) -> list[Beside]:
    return [each for each in model.modules() if isinstance(each, Beside)]


def salient_model(name: str = "llama", method: str = "nearest", activations: str | None = None) -> PreTrainedModel:
    model = tiny_model(name)
    quantize(model, qint4, activations, method=method, salient=0.05, calibration=TEXT)
    return model


def test_the_outliers_are_found_and_most_of_the_error_goes() -> None:
    x, errors = inputs(1), []
    for salient in (None, 2 / 64):
        model = layer()
        expected = model(x)
        report = quantize(model, qint4, salient=salient, calibration=[inputs(0)] if salient else None)
        errors.append((model(x) - expected).norm().item())
    (found,) = besides(model)
    assert found.columns.tolist() == list(OUTLIERS)
    assert report.replaced[0].note == "2 inputs in float"
    assert errors[1] < 0.2 * errors[0]
    torch.testing.assert_close(found.weight[:, OUTLIERS], layer()[0].weight[:, OUTLIERS])


@pytest.mark.parametrize("method", ["nearest", "search", "feedback"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-tied", "mixtral"])
def test_a_model_is_the_same_frozen_saved_and_loaded(tmp_path: Path, name: str, method: str) -> None:
    model = salient_model(name, method)
    assert besides(model)
    before = logits(model)
    freeze(model)
    after = logits(model)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    again.set_attn_implementation("eager")  # type: ignore[operator]
    assert torch.equal(logits(again), after)
    assert [each.columns.tolist() for each in besides(again)] == [each.columns.tolist() for each in besides(model)]
    assert n_bytes(again) == n_bytes(model)
    assert torch.equal(logits(copy.deepcopy(model)), after)


def test_the_input_can_be_given_by_name() -> None:
    model, x = layer(), inputs(0)
    quantize(model, qint4, salient=0.02, calibration=[x])
    assert torch.equal(model[0](input=x), model(x))


def test_it_loses_less_than_without() -> None:
    losses = []
    for salient in (None, 0.25):
        model = tiny_model("llama")
        expected = logits(model, TEXT)
        quantize(model, qint4, salient=salient, calibration=None if salient is None else TEXT)
        losses.append((logits(model, TEXT) - expected).norm().item())
    assert losses[1] < losses[0]


def test_state_dicts_go_from_one_model_to_another() -> None:
    model, other = salient_model(), tiny_model("llama", seed=1)
    quantize(other, qint4, salient=0.05, calibration=TEXT)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    freeze(model)
    freeze(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_columns_and_codes_are_trained() -> None:
    model = salient_model()
    found = besides(model)[0]
    model(TOKENS, labels=TOKENS).loss.backward()
    assert found.side.grad is not None
    assert found.side.grad.abs().sum() > 0
    assert found.rest.weight.grad is not None


@pytest.mark.parametrize("smooth", [False, True])
def test_activations_are_calibrated_as_ever(smooth: bool) -> None:
    """No factor goes into a norm whose readers have columns outside of their matrix."""
    model = salient_model(activations="qint8")
    expected = logits(tiny_model("llama"))
    with calibrate(model, smooth=smooth):
        for ids in TEXT.split(1):
            model(ids)
    before = logits(model)
    freeze(model)
    after = logits(model)
    assert (after - before).norm() < 0.05 * before.norm()
    assert (after - expected).norm() < expected.norm()


@pytest.mark.parametrize("weights", ["qint2", "int4-g24", "nf4", "nvfp4", "qfloat8", "q4_0"])
def test_any_grid_with_a_zero_will_do(weights: str) -> None:
    model = layer()
    quantize(model, weights, salient=2 / 64, calibration=[inputs(0)])
    assert besides(model)[0].columns.tolist() == list(OUTLIERS)


def test_tied_and_unreached_matrices_stay_whole() -> None:
    model = tiny_model("qwen2-tied")
    quantize(model, qint4, salient=0.05, calibration=TEXT)
    assert not any(each is model.lm_head for each in besides(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": qint4, "salient": 0.01}, "salient= chooses channels for what arrives at the layers"),
        ({"weights": qint4, "salient": 1.0, "calibration": TEXT}, "is not a share of the input channels"),
        ({"weights": "iq4_nl", "salient": 0.01, "calibration": TEXT}, "iq4_nl has no zero to put there"),
        ({"weights": "kmeans4", "salient": 0.01, "calibration": TEXT}, "kmeans4 has no zero to put there"),
        ({"salient": 0.01, "calibration": TEXT}, "give weights=, too"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_changes(options: dict[str, object], message: str) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RecipeError, match=message):
        quantize(model, **options)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padding_is_not_counted() -> None:
    mask = torch.ones_like(TEXT)
    mask[:, 6:] = 0
    found = []
    for padding in (0, 7):
        model, ids = tiny_model("llama"), TEXT.where(mask > 0, padding)
        layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
        found.append(squares_of(model, layers, calls_of({"input_ids": ids, "attention_mask": mask})))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
