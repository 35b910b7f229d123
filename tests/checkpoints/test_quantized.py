"""Stored layers of every kind, made by hand, seen as weights."""

import pytest
import torch

from tiny import MemorySource
from whit.checkpoints.quantized import QuantizedTensors
from whit.errors import BrokenFileError
from whit.grids.indexed import Indexed
from whit.grids.named import grid_named
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import Scaled
from whit.layouts.awq import AWQ
from whit.layouts.compressed import CompressedTensors
from whit.layouts.gptq import GPTQ
from whit.layouts.native import Native
from whit.rounding.nearest import nearest

W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) + 0.4
BIAS = torch.randn(32)


def stored(parts: dict[str, torch.Tensor]) -> MemorySource:
    return MemorySource({**{f"model.a.{key}": value for key, value in parts.items()}, "model.a.bias": BIAS})


def group(**weights: object) -> dict:
    return {"targets": ["Linear"], "weights": weights}


def rounded(name: str) -> QuantizedTensor:
    return nearest(W, grid_named(name))


CASES = {
    "gptq v1": ({"quant_method": "gptq", "bits": 4}, GPTQ(1).pack(rounded("int4-g32")), "int4-g32"),
    "gptq v2, 3 bits": (
        {"quant_method": "gptq", "bits": 3, "checkpoint_format": "gptq_v2"},
        GPTQ(2).pack(rounded("int3-g32-asym")),
        "int3-g32-asym",
    ),
    "auto-round": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        GPTQ(1).pack(rounded("int4-g32")),
        "int4-g32",
    ),
    "auto-round, awq": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
        AWQ().pack(rounded("int4-g32-asym")),
        "int4-g32-asym",
    ),
    "awq": ({"quant_method": "awq", "version": "GEMM"}, AWQ().pack(rounded("int4-g32-asym")), "int4-g32-asym"),
    "packed": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"g": group(num_bits=5, type="int", strategy="group", group_size=32)},
        },
        CompressedTensors("pack-quantized").pack(rounded("int5-g32")),
        "int5-g32",
    ),
    "fp8": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"g": group(num_bits=8, type="float", strategy="channel")},
        },
        CompressedTensors("float-quantized").pack(rounded("fp8")),
        "fp8",
    ),
    "whit": (
        {"quant_method": "whit", "grids": {"model.a": "int6-g64"}},
        Native().pack(rounded("int6-g64")),
        "int6-g64",
    ),
    "whit, blocks": ({"quant_method": "whit", "grids": {"model.a": "q8_0"}}, Native().pack(rounded("q8_0")), "q8_0"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_one_weight(case: str) -> None:
    config, parts, grid = CASES[case]
    tensors = QuantizedTensors(stored(parts), config)
    assert list(tensors.names()) == ["model.a.weight", "model.a.bias"]
    assert torch.equal(tensors.read("model.a.weight"), rounded(grid).dequantize())
    assert torch.equal(tensors.read("model.a.bias"), BIAS)
    info = tensors.info("model.a.weight")
    assert info.shape == (32, 64)
    assert info.n_bytes == sum(part.numel() * part.element_size() for part in parts.values())
    assert tensors.is_quantized("model.a.weight")
    assert not tensors.is_quantized("model.a.bias")
    assert tensors.quantized("model.a.weight").grid == grid_named(grid)


def test_a_conv1d_is_turned() -> None:
    config, parts, grid = CASES["gptq v1"]
    tensors = QuantizedTensors(stored(parts), config, lambda name: name == "model.a.weight")
    assert tensors.info("model.a.weight").shape == (64, 32)
    assert torch.equal(tensors.read("model.a.weight"), rounded(grid).dequantize().T)


@pytest.mark.parametrize("case", CASES)
def test_layers_with_a_part_missing_or_cut_are_named(case: str) -> None:
    config, parts, _ = CASES[case]
    for key in parts:
        if key in ("g_idx", "qweight", "weight_packed", "weight_codes", "weight_ggml"):
            continue
        fewer = {name: value for name, value in parts.items() if name != key}
        tensors = QuantizedTensors(stored(fewer), config)
        if tensors.is_quantized("model.a.weight"):
            with pytest.raises(BrokenFileError, match="model.a.weight: its stored tensors cannot be decoded"):
                tensors.read("model.a.weight")


def test_a_layer_that_no_group_is_for_is_named() -> None:
    config, parts, _ = CASES["packed"]
    other = {**config, "config_groups": {"g": {**config["config_groups"]["g"], "targets": ["re:.*mlp.*"]}}}
    with pytest.raises(BrokenFileError, match="no config group is for model.a"):
        QuantizedTensors(stored(parts), other).info("model.a.weight")


def test_a_short_last_group_is_called_by_the_size_of_the_others() -> None:
    base = grid_named("int4-g32")
    assert isinstance(base, Scaled)
    q = nearest(W[:, :48], Indexed(base))
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    tensors = QuantizedTensors(stored(GPTQ(2).pack(q)), config)
    assert tensors.info("model.a.weight").dtype == "int4-g32"
    assert torch.equal(tensors.read("model.a.weight"), q.dequantize())
