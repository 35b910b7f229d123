"""GGML blocks against the `gguf` package's own encoders and decoders."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.grids.lattice import Lattice
from whit.grids.levels import Table
from whit.grids.named import GRIDS
from whit.grids.quantized import QuantizedTensor
from whit.layouts import ggml_fields
from whit.layouts.ggml import GGML_TYPES, ggml_type_of
from whit.rounding.nearest import nearest

# Two byte patterns may stand for the same values: minus zero in FP4, fractions of trits between two bytes.
AMBIGUOUS = ("MXFP4", "TQ1_0")
BLOCKED = [name for name, kind in GGML_TYPES.items() if kind.fields]
LATTICES = [name for name in BLOCKED if name.startswith(("IQ2", "IQ3"))]
ENCODED_BY_GGUF = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def weights(seed: int) -> np.ndarray:
    """Rows with what encoders trip over: zeros, ties of magnitude, ties of rounding, outliers, tiny values."""
    rng = np.random.default_rng(seed)
    W = (rng.standard_normal((48, 256)) * 0.02).astype(np.float32)
    W[0, :64] = 0
    W[1, :32] = 0.25
    W[2] = rng.integers(-8, 9, 256) / 16
    W[3, 5], W[3, 9] = 0.5, -0.5
    W[4, 7], W[4, 2] = 0.5, -0.5
    W[5, 100] = 1e4
    W[6] *= 1e-6
    W[7] = -np.abs(W[7])
    W[8] = W[8].astype(np.float16)
    return W


def packed(name: str, W: np.ndarray) -> np.ndarray:
    kind = GGML_TYPES[name]
    return kind.pack(nearest(torch.from_numpy(W), kind.grid)).numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ENCODED_BY_GGUF)
def test_plain_rounding_gives_the_bytes_of_the_gguf_package(name: str, seed: int) -> None:
    W = weights(seed)
    expected = quantize(W, GGMLQuantizationType[name]).reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(packed(name, W), expected)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "MXFP4"])
def test_where_nothing_lies_between_two_levels_plain_rounding_gives_the_bytes_of_the_gguf_package(name: str) -> None:
    W = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    expected = quantize(W, GGMLQuantizationType[name]).reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(packed(name, W), expected)


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the other decoder multiplies infinities too
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_bytes_decode_as_in_the_gguf_package(name: str, data: st.DataObject) -> None:
    kind = GGML_TYPES[name]
    raw = np.frombuffer(data.draw(st.binary(min_size=4 * kind.block_bytes, max_size=4 * kind.block_bytes)), np.uint8)
    if name == "MXFP4":  # an exponent of 255 is no number
        raw = np.where(np.arange(raw.size) % kind.block_bytes == 0, np.minimum(raw, 254), raw).astype(np.uint8)
    expected = dequantize(raw.reshape(2, -1), GGMLQuantizationType[name]) + np.float32(0)  # minus zero is zero
    decoded = kind.unpack(torch.from_numpy(raw.copy()), (2, 2 * kind.block)).dequantize().numpy() + np.float32(0)
    np.testing.assert_array_equal(
        decoded.view(np.uint32)[~np.isnan(decoded)], expected.view(np.uint32)[~np.isnan(expected)]
    )
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(expected))


@pytest.mark.parametrize("name", [name for name in BLOCKED if name != "MXFP4"])
@pytest.mark.parametrize("scale", [6e-8, -6e-8, 3.1e-5, -0.25, 0.0, 65504.0])
def test_subnormal_negative_and_extreme_scales_decode_as_in_the_gguf_package(name: str, scale: float) -> None:
    kind = GGML_TYPES[name]
    raw = np.random.default_rng(1).integers(0, 256, (8, kind.block_bytes), dtype=np.uint8)
    given = kind.unpack(torch.from_numpy(raw.reshape(-1)), (8, kind.block))
    floats = {key: scale if key == "scale" else -scale / 3 for key in given.params if not key.startswith("sub")}
    params = {**given.params, **{key: torch.full_like(given.params[key], value) for key, value in floats.items()}}
    raw = kind.pack(QuantizedTensor(kind.grid, given.shape, given.codes, params)).numpy().reshape(8, -1)
    expected = dequantize(raw, GGMLQuantizationType[name])
    decoded = kind.unpack(torch.from_numpy(raw.reshape(-1)), (8, kind.block)).dequantize().numpy()
    np.testing.assert_array_equal(decoded.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", BLOCKED)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_pack_undoes_unpack_on_all_byte_values(name: str, seed: int) -> None:
    kind = GGML_TYPES[name]
    raw = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, 6 * kind.block_bytes, dtype=np.uint8))
    given = kind.unpack(raw, (3, 2 * kind.block))
    again = kind.pack(given)
    if name in AMBIGUOUS:
        given = kind.unpack(again, given.shape)
        assert torch.equal(kind.pack(given), again)
        assert torch.equal(given.codes, kind.unpack(raw, given.shape).codes)
    else:
        assert torch.equal(again, raw)


@pytest.mark.parametrize("name", [name for name in BLOCKED if name not in LATTICES])
def test_a_code_lands_at_the_position_where_the_gguf_package_reads_it(name: str) -> None:
    kind = GGML_TYPES[name]
    neutral = kind.unpack(torch.zeros(kind.block_bytes, dtype=torch.uint8), (1, kind.block))
    for position in range(kind.block):
        codes = torch.zeros_like(neutral.codes)
        levels = kind.grid.levels  # type: ignore[attr-defined]
        codes[0, position] = len(levels.numbers) - 1 if isinstance(levels, Table) else 2**levels.bits - 1
        params = {key: torch.ones_like(value) for key, value in neutral.params.items()}
        raw = kind.pack(type(neutral)(kind.grid, (1, kind.block), codes, params)).numpy()
        read = dequantize(raw[None], GGMLQuantizationType[name])[0]
        assert len(set(np.delete(read, position))) == 1
        assert read[position] != read[position - 1]


@pytest.mark.parametrize("name", LATTICES)
def test_a_sign_lands_at_the_position_where_the_gguf_package_reads_it(name: str) -> None:
    kind = GGML_TYPES[name]
    grid = kind.grid
    assert isinstance(grid, Lattice)
    neutral = kind.unpack(torch.zeros(kind.block_bytes, dtype=torch.uint8), (1, kind.block))
    params = {key: torch.ones_like(value) for key, value in neutral.params.items()}
    for position in range(kind.block - 1):
        codes = torch.zeros_like(neutral.codes)
        step, within = divmod(position, grid.step)
        signs = 1 << within
        if grid.parity:
            signs |= 1 << (grid.step - 1 if within < grid.step - 1 else 0)  # a second one makes the number even
        codes[0, step] = signs << (grid.bits * grid.parts)
        raw = kind.pack(type(neutral)(grid, (1, kind.block), codes, params)).numpy()
        read = dequantize(raw[None], GGMLQuantizationType[name])[0]
        assert read[position] < 0
        assert (read < 0).sum() == 1 + grid.parity


@pytest.mark.parametrize("name", GGML_TYPES)
def test_sizes_and_numbers_are_those_of_the_gguf_package(name: str) -> None:
    kind = GGML_TYPES[name]
    assert kind.number == GGMLQuantizationType[name].value
    assert (kind.block, kind.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert kind.n_bytes((3, 512)) * 8 == kind.grid.bits_per_weight(512) * 3 * 512


def test_every_type_is_found_by_its_grid_and_others_have_none() -> None:
    assert all(ggml_type_of(kind.grid) is kind for kind in GGML_TYPES.values())
    assert ggml_type_of(GRIDS["int4-g128"]) is None


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="100 weights do not divide into Q4_0 blocks of 32"):
        GGML_TYPES["Q4_0"].n_bytes((4, 100))


@pytest.mark.parametrize("name", [name for name, kind in GGML_TYPES.items() if kind.fields])
def test_without_the_compiled_library_the_bytes_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = GGML_TYPES[name]
    raw = torch.randint(
        0, 256, (kind.n_bytes((6, 512)),), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    quantized = kind.unpack(raw, (6, 512))
    with_it = kind.pack(quantized)
    monkeypatch.setattr(ggml_fields, "LIBRARY", None)
    assert torch.equal(kind.pack(quantized), with_it)
