"""compressed-tensors, against the package's own compressors and decompressors."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from whit.grids.named import grid_named
from whit.grids.scaled import Offset, PerChannel, PerGroup, Scaled, integer_grid
from whit.layouts.compressed import FLOAT, INT, MXFP4, NVFP4, PACKED, CompressedTensors, is_dense
from whit.rounding.nearest import nearest

W = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)) + 0.3


def weights_of(grid: Scaled) -> dict:
    kind = "float" if grid.levels.bits != 4 and not hasattr(grid.levels, "zero") else "int"
    if grid == grid_named("mxfp4"):
        kind = "float"
    bits = 8 if kind == "float" and grid.levels.bits == 8 else grid.levels.bits
    found = {"num_bits": bits, "type": kind, "symmetric": grid.offset is Offset.NONE}
    if isinstance(grid.scheme, PerGroup):
        return {**found, "strategy": "group", "group_size": grid.scheme.size}
    return {**found, "strategy": "channel" if isinstance(grid.scheme, PerChannel) else "tensor"}


def theirs(format_: str, parts: dict, grid: Scaled) -> torch.Tensor:
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights_of(grid)), format=format_)
    return BaseCompressor.get_value_from_registry(format_).decompress(dict(parts), scheme)["weight"]


NAMES = [f"int{b}{s}{z}:f32" for b in range(2, 9) for s in ("", "-g32", "-g64") for z in ("", "-asym")]
CASES = [(PACKED, name) for name in NAMES]
CASES += [(INT, f"int8{s}:f32") for s in ("", "-asym", "-g32", "-tensor")]
CASES += [(FLOAT, f"fp8{s}:f32") for s in ("", "-tensor")]


@pytest.mark.parametrize(("format_", "name"), CASES)
def test_the_package_decodes_the_same_values(format_: str, name: str) -> None:
    grid, layout = grid_named(name), CompressedTensors(format_)
    assert isinstance(grid, Scaled)
    q = nearest(W, grid)
    parts = layout.pack(q)
    for key, spec in layout.schema(grid, (24, 128)).items():
        assert (tuple(parts[key].shape), parts[key].dtype) == (spec.shape, spec.dtype)
    assert torch.equal(theirs(format_, parts, grid).float(), q.dequantize())
    back = layout.unpack(parts, weights_of(grid))
    assert back.grid == grid
    assert torch.equal(back.codes, q.codes)


def test_mxfp4() -> None:
    grid = grid_named("mxfp4")
    q = nearest(W, grid)
    parts = CompressedTensors(MXFP4).pack(q)
    decoded = theirs(MXFP4, parts, grid).float()
    assert torch.equal(decoded, q.dequantize())
    assert torch.equal(CompressedTensors(MXFP4).unpack(parts, {}).dequantize(), q.dequantize())


@pytest.mark.parametrize("unit", [2.0**-7, 1 / 300])
def test_nvfp4(unit: float) -> None:
    grid = grid_named("nvfp4")
    assert isinstance(grid, Scaled)
    grid = replace(grid, unit=unit)
    q = nearest(W, grid)
    assert (q.dequantize() - W).norm() < 0.12 * W.norm()
    layout = CompressedTensors(NVFP4)
    parts = layout.pack(q)
    for key, spec in layout.schema(grid, (24, 128)).items():
        assert (tuple(parts[key].shape), parts[key].dtype) == (spec.shape, spec.dtype)
    dtype = torch.float8_e4m3fn
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights, scale_dtype=dtype, zp_dtype=dtype), format=NVFP4
    )
    decoded = BaseCompressor.get_value_from_registry(NVFP4).decompress(dict(parts), scheme)["weight"].float()
    torch.testing.assert_close(decoded, q.dequantize(), rtol=2.0**-7, atol=0)  # the package decodes to bfloat16
    if unit == 2.0**-7:  # whose digits are enough for the product of two numbers of few bits
        assert torch.equal(decoded, q.dequantize())
    back = layout.unpack(parts, weights)
    torch.testing.assert_close(back.dequantize(), q.dequantize(), rtol=1e-6, atol=0)
    assert torch.equal(back.codes, q.codes)


def test_scales_of_sixteen_bits_keep_their_dtype() -> None:
    grid = grid_named("int4-g32:bf16")
    parts = CompressedTensors(PACKED).pack(nearest(W, grid))
    assert parts["weight_scale"].dtype == torch.bfloat16
    assert CompressedTensors(PACKED).unpack(parts, weights_of(grid)).grid == grid


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_files_of_the_older_packing_are_told_apart_and_read(bits: int) -> None:
    grid = integer_grid(bits, PerGroup(64), symmetric=True)
    q = nearest(W, grid)
    parts, per_word = CompressedTensors(PACKED).pack(q), 32 // bits
    words = torch.zeros(24, -(-128 // per_word), dtype=torch.int32)
    for j in range(128):
        words[:, j // per_word] |= q.codes[:, j].int() << (bits * (j % per_word))
    assert is_dense(parts["weight_packed"].shape[1], bits, 128)
    assert not is_dense(words.shape[1], bits, 128)
    old = {**parts, "weight_packed": words}
    assert torch.equal(CompressedTensors(PACKED, dense=False).unpack(old, weights_of(grid)).codes, q.codes)


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    assert "one level of scales" in str(CompressedTensors(PACKED).refuses(grid_named("q4_1"), (8, 64)))
    assert "does not hold" in str(CompressedTensors(INT).refuses(grid_named("int4"), (8, 64)))
    assert "groups of 128" in str(CompressedTensors(PACKED).refuses(grid_named("int4-g128"), (8, 576)))
    with pytest.raises(ValueError, match="does not hold"):
        CompressedTensors(FLOAT).pack(nearest(W, grid_named("int8")))


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    grid = integer_grid(4, PerGroup(32), symmetric=True)
    parts = CompressedTensors(PACKED).pack(nearest(W, grid))
    with pytest.raises(ValueError, match="does not fit strategy"):
        CompressedTensors(PACKED).unpack(parts, {"num_bits": 4, "strategy": "group", "group_size": 64})
