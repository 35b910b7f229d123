import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from whit.errors import ModelError
from whit.models.activations import InputScheme, input_scheme, quantize_inputs

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
    with pytest.raises(ModelError, match="no such layer"):
        quantize_inputs(module, {"nowhere": scheme})
