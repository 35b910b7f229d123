import copy
import pickle

import pytest
import torch

from whit.grids.named import grid_named
from whit.live.quantize import freeze, quantize
from whit.live.stored import Frozen, Stored
from whit.live.types import TYPES
from whit.rounding.nearest import nearest

NAMES = [*TYPES, "q4_k", "q4_0", "nvfp4", "iq2_xs", "int8-tensor"]


def frozen(name: str, seed: int = 0, rows: int = 19) -> Frozen:
    W = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed)) * 0.1
    return Frozen.of(nearest(W, TYPES[name] if name in TYPES else grid_named(name)))


def assert_same(a: Frozen, b: Frozen) -> None:
    assert torch.equal(a.quantized.dequantize(), b.quantized.dequantize())
    for name, value in a.tensors.items():
        assert value.dtype == b.tensors[name].dtype


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_comes_back(name: str) -> None:
    W = torch.randn(19, 256, generator=torch.Generator().manual_seed(0)) * 0.1
    grid = TYPES[name] if name in TYPES else grid_named(name)
    assert torch.equal(frozen(name).quantized.dequantize(), nearest(W, grid).dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cast(name: str, dtype: torch.dtype) -> None:
    assert_same(frozen(name).to(dtype), frozen(name))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_fills_another_one(name: str, assign: bool) -> None:
    source, target = frozen(name), frozen(name, seed=1)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert_same(target, source)
    assert all(target.packed.buffers[key] is value for key, value in target.tensors.items())


def test_a_copy_owns_its_tensors() -> None:
    source = frozen("qint8")
    other = copy.deepcopy(source)
    other.tensors["scale"].zero_()
    assert other.quantized.dequantize().abs().max() == 0
    assert source.quantized.dequantize().abs().max() > 0


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["qint4", "kmeans4", "q4_k"])
def test_a_functional_call_multiplies_with_what_it_is_given(name: str, gradients: bool) -> None:
    def layer(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(256, 32))
        quantize(model, TYPES.get(name, name))
        freeze(model)
        return model

    a, b, x = layer(0), layer(1), torch.randn(3, 256)
    with torch.set_grad_enabled(gradients):
        own, other = a(x), b(x)
        assert torch.equal(torch.func.functional_call(a, b.state_dict(), x), other)
        assert torch.equal(a(x), own)
        assert torch.equal(torch.func.functional_call(copy.deepcopy(a), b.state_dict(), x), other)
        assert torch.equal(torch.func.functional_call(pickle.loads(pickle.dumps(a)), b.state_dict(), x), other)


def test_moving_to_another_device_moves_everything() -> None:
    moved = frozen("qint4").to("meta")
    assert all(value.is_meta for value in moved.packed.buffers.values())
    assert moved.packed.buffers.keys() == frozen("qint4").packed.buffers.keys()


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_another_shape_is_refused(assign: bool) -> None:
    with pytest.raises(RuntimeError, match="size mismatch|shape"):
        frozen("qint8").load_state_dict(frozen("qint8", rows=40).state_dict(), assign=assign)


def test_codes_of_another_type_are_refused_when_they_would_be_assigned() -> None:
    target, state = frozen("nf4"), frozen("nf4").state_dict()
    state["table"] = state["table"].half()  # the kernels would read beyond its end
    with pytest.raises((RuntimeError, ValueError), match="table"):
        target.load_state_dict(state, assign=True)


def test_its_printed_form_says_shape_and_bytes() -> None:
    assert "19 x 256, " in repr(frozen("qint8"))


def test_any_tensors_can_be_stored_by_name() -> None:
    stored = Stored({"scale": torch.ones(2), "zero": torch.zeros(2, dtype=torch.uint8)})
    assert stored.half().tensors["scale"].dtype == torch.float32
    assert list(stored.state_dict()) == ["scale", "zero"]
