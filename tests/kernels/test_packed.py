import pytest
import torch

from whit.grids.named import GRIDS, grid_named
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import PerGroup, integer_grid
from whit.kernels.form import Kind, buffer_specs
from whit.kernels.packed import Packed, pack, unpack


def quantized(name: str, rows: int, cols: int, seed: int = 0) -> QuantizedTensor:
    grid = grid_named(name)
    W = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05
    params = grid.store(grid.fit(W))
    return QuantizedTensor(grid, (rows, cols), grid.round(W, params), params)


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().view(torch.uint8)


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert a.grid == b.grid
    assert a.shape == b.shape
    assert torch.equal(a.codes, b.codes)
    assert all(torch.equal(bits(value), bits(b.params[name])) for name, value in a.params.items())


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("name", GRIDS)
def test_unpack_gives_back_what_was_packed(name: str, rows: int) -> None:
    q = quantized(name, rows, 512)
    packed = pack(q)
    packed.check()
    assert_same(unpack(packed), q)


@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("cols", [4, 36, 100])
def test_rows_of_any_length_are_padded_and_come_back(n_bits: int, cols: int) -> None:
    q = quantized(f"int{n_bits}", 21, cols)
    assert_same(unpack(pack(q)), q)


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_every_code_survives(n_bits: int) -> None:
    grid = GRIDS[f"int{n_bits}-g64"]
    codes = torch.arange(32 * 256).view(32, 256).remainder(2**n_bits).to(torch.uint8)
    q = QuantizedTensor(grid, (32, 256), codes, {"scale": torch.ones(32, 4, dtype=torch.float16)})
    assert torch.equal(unpack(pack(q)).codes, codes)


@pytest.mark.parametrize(("name", "n_bits"), [("int2-g64", 2), ("int3-g64", 3), ("q4_0", 4), ("int8", 8), ("q5_0", 5)])
def test_codes_are_dense(name: str, n_bits: int) -> None:
    assert pack(quantized(name, 32, 512)).buffers["codes"].numel() == 32 * 512 * n_bits // 8


@pytest.mark.parametrize("name", ["q4_k", "iq2_xxs", "iq3_s", "q6_k", "q4_0:g_idx"])
def test_plain_grids_are_dense_as_well(name: str) -> None:
    q = quantized(name, 4, 512)
    packed = pack(q)
    assert packed.buffers["codes"].numel() * 8 <= packed.form.bits * (q.codes.numel() + 7)


def test_a_group_that_no_block_divides_stays_plain() -> None:
    grid = integer_grid(3, PerGroup(16), symmetric=True)  # three bits take blocks of 32
    W = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    params = grid.store(grid.fit(W))
    q = QuantizedTensor(grid, (5, 64), grid.round(W, params), params)
    packed = pack(q)
    assert packed.form.kind is Kind.PLAIN
    assert_same(unpack(packed), q)


@pytest.mark.parametrize("name", GRIDS)
def test_the_specs_foretell_the_buffers(name: str) -> None:
    packed = pack(quantized(name, 19, 512))
    found = {key: (tuple(value.shape), value.dtype) for key, value in packed.buffers.items()}
    assert found == {key: (s.shape, s.dtype) for key, s in buffer_specs(packed.grid, packed.shape).items()}


def test_check_names_the_buffer_that_does_not_fit() -> None:
    packed = pack(quantized("q4_0", 16, 64))
    wrong = Packed(packed.grid, packed.shape, {**packed.buffers, "scale": packed.buffers["scale"].float()})
    with pytest.raises(ValueError, match="scale of packed"):
        wrong.check()
    with pytest.raises(ValueError, match="packs into"):
        Packed(packed.grid, packed.shape, {"codes": packed.buffers["codes"]}).check()


def test_check_names_outliers_that_no_kernel_may_be_given() -> None:
    packed = pack(quantized("kmeans2+5%", 4, 64))
    for column, message in (
        (64, "at columns"),
        (-1, "at columns"),
        (int(packed.buffers["columns"][1, 1]), "ascending"),
    ):
        columns = packed.buffers["columns"].clone()
        columns[1, 0] = column
        with pytest.raises(ValueError, match=message):
            Packed(packed.grid, packed.shape, {**packed.buffers, "columns": columns}).check()


def test_four_bits_lie_as_documented() -> None:
    codes = torch.zeros(16, 16, dtype=torch.uint8)
    codes[2, 1], codes[2, 5], codes[15, 8] = 9, 12, 7
    q = QuantizedTensor(GRIDS["int4"], (16, 16), codes, {"scale": torch.ones(16, 1, dtype=torch.float16)})
    expected = torch.zeros(1, 128, dtype=torch.uint8)
    expected[0, 4 * 2 + 1] = 9 | 12 << 4  # row 2: column 1 in the low half, column 5 in the high one
    expected[0, 64 + 4 * 15] = 7  # the second chunk begins with column 8
    assert torch.equal(pack(q).buffers["codes"], expected)


def test_any_zero_point_survives() -> None:
    q = quantized("int4-g32-asym", 2, 64)
    q.params["zero"][0, 0] = 200
    assert_same(unpack(pack(q)), q)
