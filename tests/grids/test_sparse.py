"""Codebooks with outliers beside the codes: which ones, what they cost, how they are stored."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from whit.errors import RecipeError
from whit.grids.codebook import Codebook
from whit.grids.named import grid_name, grid_named
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import PerGroup, PerTensor
from whit.grids.sparse import Sparse
from whit.kernels.matmul import dequantize, linear
from whit.kernels.packed import pack, unpack
from whit.layouts.native import Native
from whit.recipes.quantizers import quantizer_named
from whit.rounding.nearest import nearest, search


def heavy(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Student's t: a few weights are far from all others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, 4, generator=generator)
    return x[..., 0] / x[..., 1:].square().mean(-1).sqrt()


def loss(W: Tensor, found: QuantizedTensor, mass: Tensor | float = 1) -> float:
    return ((found.dequantize() - W).square() * mass).sum().item()


def test_values_are_those_written_by_hand() -> None:
    grid = Sparse(Codebook(1), 0.1)
    params = {
        "levels": torch.tensor([[-1.0, 1.0], [0.0, 2.0]], dtype=torch.float16),
        "columns": torch.tensor([[2], [0]], dtype=torch.int16),
        "values": torch.tensor([[8.5], [-3.0]], dtype=torch.float16),
    }
    codes = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.uint8)
    found = QuantizedTensor(grid, (2, 4), codes, params).dequantize()
    assert found.tolist() == [[-1.0, 1.0, 9.5, -1.0], [-1.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize("seed", range(6))
def test_one_outlier_and_two_levels_are_near_the_best_of_all(seed: int) -> None:
    """All outliers times all cuts of the sorted rest; turns may end in a corner, but in no bad one."""
    W = heavy(1, 12, seed)
    best = min(
        sum((part - part.mean()).square().sum().item() for part in (x[:cut], x[cut:]))
        for out, cut in itertools.product(range(12), range(1, 11))
        for x in [torch.cat([W[0, :out], W[0, out + 1 :]]).double().sort().values]
    )
    found = loss(W, nearest(W, Sparse(Codebook(1), 0.08)))
    assert best * 0.99 <= found <= 1.15 * best + 1e-4


def test_what_is_far_away_or_matters_most_lies_beside() -> None:
    W, mass = heavy(3, 400).clamp(-3, 3), torch.ones(3, 400)
    W[:, 7], mass[:, 100] = 50.0, 1e4
    W[:, 100] += 0.37
    found = search(W, Sparse(Codebook(2), 0.005), mass)
    assert found.params["columns"].tolist() == [[7, 100]] * 3
    at = [7, 100]
    assert torch.allclose(found.dequantize()[:, at], W[:, at], rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_never_worse_than_levels_alone_and_more_is_better(bits: int) -> None:
    W = heavy(16, 512)
    mass = torch.rand(16, 512, generator=torch.Generator().manual_seed(1))
    losses = [loss(W, search(W, Codebook(bits), mass), mass)]
    losses += [loss(W, search(W, Sparse(Codebook(bits), share), mass), mass) for share in (0.002, 0.01, 0.05)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.7 * losses[0]


@pytest.mark.parametrize("grid", [Sparse(Codebook(4), 0.01), Sparse(Codebook(3, PerGroup(32)), 0.03)])
def test_it_is_stored_packed_and_multiplied_with(grid: Sparse) -> None:
    W = heavy(20, 128)
    quantized = nearest(W, grid)
    parts = Native().pack(quantized)
    n_bytes = sum(each.nbytes for key, each in parts.items() if key != "weight_shape")
    assert n_bytes * 8 == grid.bits_per_weight(128) * W.numel()
    back = Native().unpack(parts, grid)
    assert torch.equal(back.dequantize(), quantized.dequantize())
    parts["weight_columns"] = parts["weight_columns"] + 128
    with pytest.raises(ValueError, match="outliers at columns"):
        Native().unpack(parts, grid)
    packed = pack(quantized)
    packed.check()
    for name, value in unpack(packed).params.items():
        assert torch.equal(value, quantized.params[name])
    assert torch.equal(dequantize(packed), quantized.dequantize())
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2))
    expected = x.double() @ quantized.dequantize().double().T
    assert torch.allclose(linear(x, packed).double(), expected, atol=1e-4)


def test_long_rows_count_columns_in_four_bytes() -> None:
    assert Sparse(Codebook(2), 0.01).schema((1, 32767))["columns"].dtype == torch.int16
    assert Sparse(Codebook(2), 0.01).schema((1, 32768))["columns"].dtype == torch.int32
    W = torch.zeros(1, 40000)
    W[0, 39999] = 1.0
    found = nearest(W, Sparse(Codebook(1), 1e-5))
    assert found.params["columns"].tolist() == [[39999]] or found.dequantize()[0, 39999] == 1


def test_rows_of_zeros_and_of_few_numbers() -> None:
    W = torch.zeros(2, 64)
    W[1, ::2] = 3.0
    assert torch.equal(nearest(W, Sparse(Codebook(2), 0.02)).dequantize(), W)


@pytest.mark.parametrize("name", ["kmeans4+0.5%", "kmeans3-g64+2%", "kmeans2+0.05%", "kmeans3+0.45%"])
def test_names_go_both_ways(name: str) -> None:
    assert grid_name(grid_named(name)) == name


def test_names_of_quantizers() -> None:
    for name in ("kmeans-4bit+0.5%", "K_M-4bit+0.5%", "kmeans4+0.5%"):
        found = quantizer_named(name)
        assert found is not None
        assert (found.grid, found.rounding) == ("kmeans4+0.5%", None)
    assert quantizer_named("uniform-4bit+0.5%") is None


@pytest.mark.parametrize("name", ["kmeans4+0%", "kmeans4+20%", "kmeans4+x%", "kmeans4+0.5", "int4-g64+1%", "q4_0+1%"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"kmeans4\+0.5%"):
        grid_named(name)
    with pytest.raises(ValueError, match="whole matrix"):
        Sparse(Codebook(4, PerTensor()), 0.01)
