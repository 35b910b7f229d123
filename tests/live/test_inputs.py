import copy

import pytest
import torch
from torch import Tensor, nn

from whit.calibration.ranges import Histogram
from whit.kernels.matmul import dequantize, linear_rounded
from whit.kernels.packed import pack
from whit.live.inputs import FP8, KINDS, Inputs, rounded_inputs
from whit.live.quantize import freeze, quantize
from whit.live.types import TYPES, fitted
from whit.rounding.nearest import nearest


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fixed(kind: str, most: float) -> Inputs:
    inputs = Inputs(kind)
    inputs.fix(most)
    return inputs


def test_a_token_has_its_own_scale_and_is_off_by_half_a_step_at_most() -> None:
    x = normal(5, 64) * torch.tensor([1e-3, 1.0, 30.0, 1e4, 1.0])[:, None]
    x[4] = 0
    y = Inputs("int8")(x)
    step = x.double().abs().amax(1, keepdim=True) / 127
    assert ((y - x).abs() <= step * 0.5001).all()
    whole = y.double() / step.clamp(min=1e-30)
    assert (whole - whole.round()).abs().max() < 1e-4


def test_a_fixed_scale_is_the_range_over_127() -> None:
    inputs = fixed("int8", 2.54)
    assert inputs.scale.item() == pytest.approx(2.54 / 127)
    y = inputs(torch.tensor([0.031, -0.049, 2.535, 9.0, -9.0]))
    assert y.tolist() == pytest.approx([0.04, -0.04, 2.54, 2.54, -2.54])


@pytest.mark.parametrize("kind", KINDS)
def test_values_beyond_a_fixed_range_are_clipped(kind: str) -> None:
    x = normal(4, 50) * 3
    y = fixed(kind, 1.5)(x)
    assert y.abs().max() == pytest.approx(1.5)
    assert torch.equal(y.sign()[x.abs() > 0.1], x.sign()[x.abs() > 0.1])


def test_fp8_values_are_those_of_torch() -> None:
    x = normal(7, 64) * 5
    scale = x.abs().amax(1, keepdim=True) / FP8
    assert torch.equal(Inputs("fp8")(x), (x / scale).to(torch.float8_e4m3fn).float() * scale)


@pytest.mark.parametrize("static", [False, True])
def test_products_of_codes_are_those_of_what_forward_returns(static: bool) -> None:
    x, packed = normal(9, 64), pack(nearest(normal(16, 64), fitted(TYPES["qint8"], 64)[0]))
    inputs = fixed("int8", 2.0) if static else Inputs("int8")
    found = linear_rounded(x, inputs.scale if static else None, packed)
    assert torch.allclose(found, inputs(x) @ dequantize(packed).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_have_the_type_of_the_inputs(kind: str, dtype: torch.dtype) -> None:
    x = normal(3, 16).to(dtype)
    for inputs in (Inputs(kind), fixed(kind, 3.0)):
        assert inputs(x).dtype == dtype


def test_casting_a_module_never_casts_a_scale() -> None:
    inputs = fixed("int8", 1.2345678)
    before = inputs.scale.clone()
    for cast in (inputs.half, inputs.bfloat16, inputs.double):
        cast()
        assert inputs.scale.dtype == torch.float32
        assert torch.equal(inputs.scale, before)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_where_nothing_is_clipped_and_stop_where_it_is(kind: str) -> None:
    x = torch.tensor([0.3, -0.7, 1.1, -5.0, 0.99], requires_grad=True)
    fixed(kind, 1.0)(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([1.0, 2.0, 0.0, 0.0, 5.0])


def test_with_a_scale_per_token_all_gradients_pass() -> None:
    x = normal(4, 8).requires_grad_()
    gradient = normal(4, 8, seed=1)
    Inputs("int8")(x).backward(gradient)
    assert torch.allclose(x.grad, gradient, rtol=1e-6)


def test_values_are_the_same_with_and_without_gradients() -> None:
    x = normal(6, 40)
    with_gradients = rounded_inputs(x.clone().requires_grad_(), None, "int8").detach()
    assert torch.allclose(with_gradients, rounded_inputs(x, None, "int8"), rtol=1e-6, atol=0)


def test_what_norms_return_is_left_alone_while_tokens_have_their_own_scale() -> None:
    x = normal(3, 8)
    outputs = Inputs("int8", leaving=True)
    assert torch.equal(outputs(x), x)
    outputs.fix(2.0)
    assert not torch.equal(outputs(x), x)


def test_an_observer_sees_what_arrives_unrounded() -> None:
    x = normal(3, 8)
    inputs = Inputs("int8")
    inputs.observer, inputs.enabled = Histogram(), False
    assert torch.equal(inputs(x), x)
    assert inputs.observer.most == x.abs().max()
    assert inputs.observer.n == 24


def test_a_range_of_zero_or_none_means_a_scale_per_token() -> None:
    inputs = fixed("int8", 3.0)
    assert inputs.static
    inputs.fix(0.0)
    assert not inputs.static
    inputs.fix(3.0)
    inputs.fix(None)
    assert not inputs.static
    assert "per token" in repr(inputs)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_carries_the_scale_and_that_there_is_one(assign: bool) -> None:
    source, target = fixed("int8", 0.7), Inputs("int8")
    target.load_state_dict(source.state_dict(), assign=assign)
    x = normal(2, 16)
    assert target.static
    assert torch.equal(target(x), source(x))
    source.load_state_dict(Inputs("int8").state_dict(), assign=assign)
    assert not source.static


def test_a_copy_has_its_own_scale() -> None:
    inputs = fixed("int8", 1.0)
    other = copy.deepcopy(inputs)
    other.fix(2.0)
    assert inputs.scale.item() == pytest.approx(1 / 127)


def test_scales_of_tiny_ranges_stay_finite() -> None:
    y = fixed("int8", 1e-40)(torch.tensor([1e-41, 0.0, -1.0]))
    assert torch.isfinite(y).all()


def test_layers_with_rounded_inputs_are_exported_for_any_number_of_rows() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    quantize(model, "q4_0", "qint8")
    freeze(model)
    rows = torch.export.Dim("rows", min=2, max=512)
    with torch.no_grad():
        exported = torch.export.export(model, (normal(4, 64),), dynamic_shapes=({0: rows},))
        for n in (3, 100):
            assert torch.equal(exported.module()(normal(n, 64)), model(normal(n, 64)))
