"""The matrix of a live layer: seen rounded, trained straight through, frozen to codes."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from tiny import tiny_model
from whit.grids.grid import Grid
from whit.grids.named import grid_named
from whit.grids.scaled import Offset, PerGroup, integer_grid
from whit.live.modules import QLinear
from whit.live.quantize import freeze, quantize
from whit.live.stored import Stored
from whit.live.twin import Twin, part, straight_through
from whit.live.types import TYPES, qint4, qint8
from whit.rounding.nearest import nearest, search

TRAINED = {
    "scale": integer_grid(4, PerGroup(16), symmetric=True, scale_dtype=torch.float32),
    "scale, zero point": integer_grid(4, PerGroup(16), symmetric=False, scale_dtype=torch.float32),
    "scale, minimum": grid_named("int3-g16-min:f32"),
    "scale per row": qint8,
    "scale per matrix": grid_named("int8-tensor:f32"),
    "table": grid_named("nf4-g16:f32"),
    "codebook": TYPES["kmeans3"],
    "unit": grid_named("int8-g64@0.5:f32"),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(grid: Grid, inputs: str | None = None, rows: int = 12, cols: int = 64, seed: int = 0) -> QLinear:
    original = nn.Linear(cols, rows)
    with torch.no_grad():
        original.weight.copy_(normal(rows, cols, seed=seed) / cols**0.5)
        original.bias.copy_(normal(rows, seed=seed + 1))
    return QLinear(original, grid, inputs)


def frozen(twin: QLinear) -> QLinear:
    holder = nn.Sequential(copy.deepcopy(twin))
    freeze(holder)
    found = holder[0]
    assert isinstance(found, QLinear)
    return found


def fix(twin: Twin, grid: Grid) -> Stored:
    """Parameters that can be trained."""
    twin.fix(nearest(twin.matrix.detach(), grid))
    assert twin.fixed is not None
    return twin.fixed


@pytest.mark.parametrize("grid", TYPES.values(), ids=TYPES)
def test_what_is_seen_is_the_nearest_point_of_the_grid(grid: Grid) -> None:
    twin = linear(grid)
    expected = nearest(twin.weight.detach(), grid).dequantize()
    assert torch.equal(twin.seen(), expected)
    with torch.no_grad():
        assert torch.equal(twin.seen(), expected)


def test_a_twin_that_is_not_active_is_the_original() -> None:
    twin = linear(qint4)
    twin.active = False
    x = normal(3, 64)
    assert torch.equal(twin(x), functional.linear(x, twin.weight, twin.bias))


def test_what_is_seen_follows_the_parameter() -> None:
    twin = linear(qint4)
    with torch.no_grad():
        twin.seen()
        twin.weight.mul_(3).add_(normal(12, 64, seed=5))
        assert torch.equal(twin.seen(), nearest(twin.weight, qint4).dequantize())


@pytest.mark.parametrize("method", ["nearest", "search"])
def test_training_through_data_is_seen_and_frozen(method: str) -> None:
    """Such changes raise no version counter."""
    model = nn.Sequential(linear(qint4, rows=64))
    if method == "search":
        fix(model[0], qint4)
    x, wanted = normal(8, 64), normal(8, 64, seed=1)

    def loss() -> Tensor:
        return (model(x) - wanted).square().mean()

    before = model[0].quantized().codes
    for _ in range(50):
        with torch.no_grad():
            evaluated = loss().item()
        model.zero_grad()
        trained = loss()
        trained.backward()
        assert evaluated == pytest.approx(trained.item(), rel=1e-4)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data -= parameter.grad
    assert not torch.equal(model[0].quantized().codes, before)
    with torch.no_grad():
        last = loss().item()
        freeze(model)
        assert loss().item() == pytest.approx(last, rel=1e-4)


def test_weights_put_in_for_evaluation_are_seen() -> None:
    """As averages over a training are."""
    model, other = nn.Sequential(linear(qint4)), linear(qint4, seed=5)
    x = normal(3, 64)
    with torch.no_grad():
        before = model(x)
        model[0].weight.data.copy_(other.weight)
        model[0].bias.data.copy_(other.bias)
        model.eval()
        assert torch.equal(model(x), other(x))
        assert not torch.equal(model(x), before)


@pytest.mark.parametrize("change", [Tensor.neg_, lambda W: W.copy_(W.flip(1)), lambda W: W[3].mul_(1.001)])
def test_chosen_codes_hold_for_the_very_weights(change: Callable[[Tensor], Tensor]) -> None:
    twin = linear(TYPES["qint2"])
    twin.fix(search(twin.weight.detach(), TYPES["qint2"]))
    kept = twin._chosen
    assert kept is not None
    before = twin.weight.detach().clone()
    assert twin._kept() is kept[1]
    change(twin.weight.data)
    assert twin._kept() is None
    twin.weight.data.copy_(before)
    assert twin._kept() is kept[1]


def test_tied_twins_share_a_copy_of_what_others_have_too() -> None:
    parameter = nn.Parameter(normal(12, 64))
    layers = [linear(qint4), linear(qint4), linear(qint8), nn.Linear(64, 12)]
    for layer in layers:
        layer._parameters["weight"] = parameter
    model = nn.Sequential(*layers)
    a, b, c, _ = layers
    assert part(model, [a, b, c]) == [a, b, c]
    assert a.weight is b.weight
    assert len({id(each.weight) for each in layers}) == 3
    assert layers[3].weight is parameter
    assert all(torch.equal(each.weight, parameter) for each in layers)
    assert part(model, [a, b, c]) == []


def test_what_is_seen_follows_a_new_parameter() -> None:
    twin = linear(qint4)
    with torch.no_grad():
        twin.seen()
        twin.weight = nn.Parameter(normal(12, 64, seed=6))
        assert torch.equal(twin.seen(), nearest(twin.weight, qint4).dequantize())


@pytest.mark.parametrize("grid", TYPES.values(), ids=TYPES)
def test_gradients_of_weights_are_those_at_the_rounded_weights(grid: Grid) -> None:
    twin, x, gradient = linear(grid), normal(5, 64, seed=7), normal(5, 12, seed=8)
    twin(x).square().backward(gradient)
    Q = nearest(twin.weight.detach(), grid).dequantize().requires_grad_()
    functional.linear(x, Q, twin.bias.detach()).square().backward(gradient)
    assert torch.allclose(twin.weight.grad, Q.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", TRAINED.values(), ids=TRAINED)
def test_gradients_of_parameters_are_finite_differences_at_fixed_codes(grid: Grid) -> None:
    """The decoded matrix is linear in each, so that a difference of any size is exact."""
    W, R = normal(6, 64), normal(6, 64, seed=1)
    quantized = nearest(W, grid)
    for name, value in quantized.params.items():
        if not value.is_floating_point():
            continue
        leaf = value.clone().requires_grad_()
        params = {**quantized.params, name: leaf}
        straight_through(W, type(quantized)(grid, (6, 64), quantized.codes, params)).backward(R)
        assert leaf.grad is not None
        for at in range(value.numel()):
            step = torch.zeros(value.numel(), dtype=torch.float32)
            step[at] = 0.5 * value.flatten()[at].abs() + 0.1
            ends = [
                grid.decode(quantized.codes, {**params, name: value + sign * step.view(value.shape)})
                for sign in (1, -1)
            ]
            slope = ((ends[0].double() - ends[1].double()) * R.double()).sum() / (2 * step[at].double())
            assert leaf.grad.flatten()[at].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("grid", TRAINED.values(), ids=TRAINED)
def test_fixed_parameters_of_a_layer_can_be_trained(grid: Grid) -> None:
    twin, x, wanted = linear(grid), normal(40, 64, seed=2), normal(40, 12, seed=3)
    stored = fix(twin, grid)
    trained = [value.requires_grad_() for value in stored.tensors.values() if value.is_floating_point()]
    twin.weight.requires_grad_(False)
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (twin(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_an_offset_that_is_an_integer_gets_no_gradient() -> None:
    twin = linear(qint4)
    assert TRAINED["scale, zero point"].offset is Offset.ZERO_POINT
    stored = fix(twin, qint4)
    twin(normal(2, 64)).sum().backward()
    assert stored.tensors["zero"].grad is None


@pytest.mark.parametrize("inputs", [None, "int8", "fp8"])
@pytest.mark.parametrize("grid", [qint8, qint4], ids=["qint8", "qint4"])
def test_training_lowers_a_loss_and_freezing_keeps_it(grid: Grid, inputs: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    activations = {None: None, "int8": "qint8", "fp8": "qfloat8"}[inputs]
    quantize(model, grid, activations)
    x, wanted = normal(64, 32), normal(64, 8, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    last = (model(x) - wanted).square().mean().item()
    freeze(model)
    with torch.no_grad():
        after = (model(x) - wanted).square().mean().item()
    assert after == pytest.approx(last, rel=1e-3 if inputs else 1e-5)


@pytest.mark.parametrize("inputs", [None, "int8", "fp8"])
@pytest.mark.parametrize("grid", [TYPES["qint8"], TYPES["qint4"], TYPES["kmeans3"], grid_named("q4_0:g_idx")])
def test_inputs_get_the_same_gradients_frozen_or_not(grid: Grid, inputs: str | None) -> None:
    twin = linear(grid, inputs)
    x, gradient = normal(4, 64), normal(4, 12, seed=1)
    found = []
    for layer in (twin, frozen(twin)):
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(gradient)
        assert leaf.grad is not None
        found.append(leaf.grad)
    Q = nearest(twin.weight.detach(), grid).dequantize()
    for each in found:
        assert torch.allclose(each, gradient @ Q, rtol=1e-4, atol=1e-4)


def test_gradients_of_inputs_stop_where_they_are_clipped_frozen_or_not() -> None:
    twin = linear(qint8, "int8")
    assert twin.inputs is not None
    twin.inputs.fix(0.5)
    x = normal(4, 64)
    for layer in (twin, frozen(twin)):
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        assert leaf.grad is not None
        assert (leaf.grad[x.abs() > 0.5] == 0).all()
        assert (leaf.grad[x.abs() < 0.5] != 0).all()


@pytest.mark.parametrize("inputs", [None, "int8", "fp8"])
def test_a_bias_gets_its_gradient_after_freezing_too(inputs: str | None) -> None:
    twin = frozen(linear(qint8, inputs))
    gradient = normal(4, 12)
    twin(normal(4, 64)).backward(gradient)
    assert torch.allclose(twin.bias.grad, gradient.sum(0), rtol=1e-5)


def test_what_was_seen_in_inference_mode_serves_training_of_others() -> None:
    """A frozen base under an adapter: evaluated in inference mode, then trained through."""
    twin = linear(qint8)
    twin.requires_grad_(False)
    x = normal(4, 64)
    with torch.inference_mode():
        twin(x)
    leaf = x.clone().requires_grad_()
    twin(leaf).sum().backward()
    assert leaf.grad is not None


def test_codes_that_a_search_has_chosen_are_what_is_frozen() -> None:
    grid = TYPES["qint3"]
    twin = linear(grid)
    wanted = search(twin.weight.detach(), grid)
    twin.fix(wanted)
    assert torch.equal(twin.seen(), wanted.dequantize())
    codes = frozen(twin).quantized()
    assert torch.equal(codes.codes, wanted.codes)
    assert all(torch.equal(value, wanted.params[name]) for name, value in codes.params.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chosen_codes_survive_weights_of_fewer_bits(dtype: torch.dtype) -> None:
    twin = linear(TYPES["qint4"]).to(dtype)
    wanted = search(twin.weight.detach().float(), TYPES["qint4"])
    twin.fix(wanted)
    for layer in (twin, copy.deepcopy(twin)):
        assert torch.equal(layer.quantized().codes, wanted.codes)


def test_fixed_parameters_stay_when_weights_are_trained_further() -> None:
    twin = linear(qint8)
    stored = fix(twin, qint8)
    before = stored.tensors["scale"].clone()
    with torch.no_grad():
        twin.weight.add_(normal(12, 64, seed=3) * 0.01)
    found = twin.quantized()
    assert torch.equal(found.params["scale"], before)
    assert torch.equal(found.codes, qint8.round(twin.weight.detach(), {"scale": before}))


def test_forgetting_brings_back_the_range() -> None:
    twin = linear(TYPES["qint2"])
    twin.fix(search(twin.weight.detach(), TYPES["qint2"]))
    twin.forget()
    assert torch.equal(twin.seen(), nearest(twin.weight.detach(), TYPES["qint2"]).dequantize())


def test_the_weight_of_a_frozen_twin_is_what_its_codes_stand_for() -> None:
    twin = linear(qint4)
    expected = nearest(twin.weight.detach(), qint4).dequantize()
    assert torch.equal(frozen(twin).weight, expected)
    assert not list(frozen(twin).named_parameters("weight", recurse=False)) or "weight" not in dict(
        frozen(twin).named_parameters()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_who_reads_the_weight_of_a_frozen_twin_finds_it_cast_like_all_others(dtype: torch.dtype) -> None:
    twin = linear(qint4)
    expected = frozen(twin).weight.to(dtype)
    for each in (frozen(twin).to(dtype), copy.deepcopy(frozen(twin).to(dtype)), frozen(twin.to(dtype))):
        assert each.weight.dtype == dtype
    assert torch.equal(frozen(linear(qint4)).to(dtype).weight, expected)


def test_a_copy_is_trained_alone() -> None:
    twin = linear(qint4)
    with torch.no_grad():
        before = twin.seen().clone()
        other = copy.deepcopy(twin)
        other.weight.zero_()
        assert other.seen().abs().max() == 0
        assert torch.equal(twin.seen(), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_a_float_layer_fits_a_twin(assign: bool) -> None:
    original, twin = nn.Linear(64, 12), linear(qint4)
    with torch.no_grad():
        twin.seen()
        twin.load_state_dict(original.state_dict(), assign=assign)
        assert torch.equal(twin.seen(), nearest(original.weight, qint4).dequantize())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", [None, "int8", "fp8"])
def test_a_frozen_layer_multiplies_in_the_type_of_its_inputs(inputs: str | None, dtype: torch.dtype) -> None:
    twin = frozen(linear(qint8, inputs))
    x = normal(3, 64)
    with torch.no_grad():
        exact = twin(x)
        found = twin.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found.double() - exact.double()).abs().max() < {torch.bfloat16: 0.1, torch.float16: 0.01}.get(dtype, 1e-5)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("grid", [qint8, grid_named("q4_k")], ids=["qint8", "q4_k"])
@pytest.mark.parametrize("inputs", [None, "int8", "fp8"])
def test_autocast_means_the_same_before_and_after_freezing(inputs: str | None, grid: Grid, gradients: bool) -> None:
    twin = linear(grid, inputs, cols=256)
    x = normal(3, 256)
    torch.compiler.reset()  # all layers of a class share one limit of compilations
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        before, after = twin(x), frozen(twin)(x)
        compiled = torch.compile(frozen(twin), fullgraph=True, backend="aot_eager")(x)
    assert before.dtype == after.dtype == compiled.dtype == torch.bfloat16
    assert torch.allclose(before, after, rtol=0.02, atol=0.05)
    assert torch.allclose(compiled, after, rtol=0.02, atol=0.05)
    assert frozen(twin)(x).dtype == torch.float32


def test_trained_scales_are_seen_at_once_and_frozen() -> None:
    grid = TRAINED["scale"]
    twin = linear(grid)
    scale = fix(twin, grid).tensors["scale"].requires_grad_()
    with torch.no_grad():
        before = twin.seen().clone()
        scale.mul_(2)
        assert torch.equal(twin.seen(), 2 * before)
    assert torch.equal(frozen(twin).weight, 2 * before)
    assert not any(value.requires_grad for value in frozen(twin).buffers())


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q3_k", "iq4_xs"])
def test_scales_of_superblocks_get_gradients_too(name: str) -> None:
    grid, W, R = grid_named(name), normal(3, 512), normal(3, 512, seed=1)
    quantized = nearest(W, grid)
    floats = [key for key, value in quantized.params.items() if value.is_floating_point()]
    assert floats
    for key in floats:
        value = quantized.params[key]
        leaf = value.clone().requires_grad_()
        straight_through(W, type(quantized)(grid, (3, 512), quantized.codes, {**quantized.params, key: leaf})).backward(
            R
        )
        ends = [grid.decode(quantized.codes, {**quantized.params, key: value.float() + by}) for by in (1, -1)]
        slope = (((ends[0] - ends[1]) / 2).double() * R.double()).view(3, -1, 512 // value.shape[1]).sum(-1)
        assert torch.allclose(leaf.grad.double(), slope, rtol=1e-2, atol=1e-2 * slope.abs().max().item())


@pytest.mark.parametrize("name", ["nearest", "search", "frozen"])
def test_transformers_saves_tied_twins(name: str, tmp_path: Path) -> None:
    model = tiny_model("qwen2-tied")
    quantize(model, qint4, method="search" if name == "search" else "nearest")
    if name == "frozen":
        freeze(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {key for key in model.state_dict() if not key.startswith("lm_head.")} <= saved.keys()
    other = tiny_model("qwen2-tied", seed=1)
    quantize(other, qint4, method="search" if name == "search" else "nearest")
    if name == "frozen":
        freeze(other)
    other.load_state_dict(saved, strict=False)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
