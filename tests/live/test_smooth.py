import pytest
import torch
from torch import Tensor, nn

from tiny import random_tokens, tiny_model
from whit.live.calibrate import calibrate
from whit.live.quantize import freeze, quantize
from whit.live.run import Call, calls_of, divergence, log_probabilities, unrounded
from whit.live.smooth import smooth
from whit.live.twin import Twin

BATCHES = [torch.tensor([random_tokens(32, seed)]) for seed in range(2)]
MODELS = ("llama", "llama-tied-biased", "gpt2", "gemma3_text", "phi3", "opt", "mixtral", "gpt_neox")


def with_outliers(name: str, weights: str = "qint8") -> nn.Module:
    """A few channels of every norm are thirty times the others, as in large models."""
    model = tiny_model(name)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() == 1 and value.numel() == 64 and key.endswith("weight"):
                value[[5, 40]] = 30.0
    quantize(model, weights, "qint8")
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(BATCHES[0]).logits


def rounding_off(model: nn.Module) -> Tensor:
    with unrounded(model):
        return logits(model)


@pytest.mark.parametrize("name", MODELS)
def test_the_float_function_stays(name: str) -> None:
    model = with_outliers(name)
    exact = rounding_off(model)
    assert smooth(model, calls_of(BATCHES)) > 0
    assert (rounding_off(model) - exact).abs().max() < 1e-4 * exact.abs().max()


def test_the_router_keeps_what_it_sees() -> None:
    model = with_outliers("mixtral")
    norms = [layer.post_attention_layernorm.weight.detach().clone() for layer in model.model.layers]
    smooth(model, calls_of(BATCHES))
    for layer, before in zip(model.model.layers, norms, strict=True):
        assert torch.equal(layer.post_attention_layernorm.weight, before)


def test_what_sticks_out_is_evened_out() -> None:
    model = with_outliers("llama")
    norm = model.model.layers[0].input_layernorm
    before = norm.weight.abs().max() / norm.weight.abs().median()
    smooth(model, calls_of(BATCHES))
    assert norm.weight.abs().max() / norm.weight.abs().median() < before / 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_calibrating_with_it_helps(name: str) -> None:
    found = []
    for on in (False, True):
        model = with_outliers(name)
        calls = calls_of(BATCHES)
        with unrounded(model):
            reference = log_probabilities(model, calls)
        with torch.no_grad(), calibrate(model, smooth=on) as result:
            for call in calls:
                call(model)
        assert (result.smoothed > 0) == on
        found.append(divergence(model, calls, reference))
    assert found[1] < 0.7 * found[0]


def test_even_norms_keep_their_weights() -> None:
    """Where nothing sticks out, factors would only cost."""
    torch.manual_seed(0)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16, bias=False)
            with torch.no_grad():
                self.layer.weight.copy_(torch.tensor([[1.0, -1.0] * 8]).expand(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x))

    model = Plain()
    quantize(model, "qint8", "qint8")
    signs = torch.where(torch.rand(40, 16) < 0.5, -1.0, 1.0)
    before = model.norm.weight.detach().clone()
    smooth(model, [Call((signs,), {})])
    assert torch.allclose(model.norm.weight, before, rtol=0.3)


def test_codes_that_are_chosen_stay_chosen() -> None:
    model = tiny_model("llama")
    quantize(model, "qint4", "qint8", method="search")
    expected = {name: each.seen().detach().clone() for name, each in model.named_modules() if isinstance(each, Twin)}
    with torch.no_grad(), calibrate(model, smooth=True) as result:
        model(BATCHES[0])
    assert result.smoothed == 0
    for name, value in expected.items():
        assert torch.equal(model.get_submodule(name).seen(), value)


def test_a_frozen_model_is_left_as_it_is() -> None:
    model = with_outliers("llama")
    freeze(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert smooth(model, calls_of(BATCHES)) == 0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
