import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from whit.errors import ModelError
from whit.models.activations import InputScheme, fixed_scale, input_scheme, quantize_inputs

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30.0]).view(2, 1, 1)


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("strategy", ["token", "tensor"])
def test_the_package_computes_the_same(kind: str, strategy: str) -> None:
    arguments = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": True}
    theirs = QuantizationArgs(**arguments)
    scale, zero = compute_dynamic_scales_and_zp(X, theirs, torch.nn.Linear(64, 1))
    scheme = input_scheme(arguments, None)
    assert scheme is not None
    assert torch.equal(scheme.apply(X), fake_quantize(X, scale, zero, theirs))


def test_a_fixed_scale_comes_from_the_file() -> None:
    arguments = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    scheme = input_scheme(arguments, torch.tensor([0.5]))
    assert scheme == InputScheme("int", token=False, scale=0.5)
    assert torch.equal(scheme.apply(torch.tensor([0.6, 1000.0])), torch.tensor([0.5, 63.5]))
    with pytest.raises(ModelError, match="input_scale"):
        input_scheme(arguments, None)


def test_a_fixed_range_of_integers_gives_a_few_large_inputs_up_for_the_many() -> None:
    tokens = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    usual = fixed_scale(tokens, "int")
    assert 2.5 < usual * 127 <= tokens.abs().max()
    tokens[0, 0] = 3000.0
    assert 0.8 * usual < fixed_scale(tokens, "int") < 1.3 * usual
    assert fixed_scale(tokens, "float") == pytest.approx(3000 / 448)
    assert fixed_scale(torch.zeros(3, 4), "int") == 1.0


@pytest.mark.parametrize("change", [{"num_bits": 4}, {"strategy": "group"}, {"symmetric": False}])
def test_what_is_not_computed_is_refused(change: dict) -> None:
    with pytest.raises(ModelError, match="not computed"):
        input_scheme({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, **change}, None)


def test_layers_see_rounded_inputs() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    x, scheme = torch.randn(3, 4), InputScheme("int", token=True)
    expected = module[0].weight @ scheme.apply(x).T
    quantize_inputs(module, {"0": scheme})
    assert torch.allclose(module(x), expected.T)
    with pytest.raises(ModelError, match="transformers has none there"):
        quantize_inputs(module, {"nowhere": scheme})
