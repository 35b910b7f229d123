"""The kernels for GPUs, run by Triton's interpreter and compiled for two kinds of device, with no device there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from whit.grids.named import grid_named
from whit.kernels import library, ops, reference
from whit.kernels.matmul import _matrix, linear_int8, quantize_rows
from whit.kernels.packed import pack
from whit.rounding.nearest import nearest

TRITON = Path(__file__).parents[2] / "build" / "triton"  # apart: torch and transformers look whether it is there
needs_triton = pytest.mark.skipif(
    not (TRITON / ".installed").exists(), reason="Triton is not in build/triton (make triton)"
)


def found(what: str, tmp_path: Path, **environment: str) -> list[dict[str, Any]]:
    program = Path(__file__).with_name("on_gpu.py")
    paths = os.pathsep.join([str(TRITON), str(Path(__file__).parents[2] / "src")])
    own = {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, program, what], capture_output=True, text=True, env={**os.environ, **own})
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


@needs_triton
def test_products_are_those_of_the_decoded_matrix(tmp_path: Path) -> None:
    products = found("interpreted", tmp_path, TRITON_INTERPRET="1")
    assert len(products) > 200
    bounds = {"float32": 1e-5, "int8": 1e-5, "bfloat16": 2**-8}
    assert not [each for each in products if not each["error"] <= bounds[each["x"]]]


@needs_triton
def test_kernels_compile_for_devices_and_fit_into_their_registers(tmp_path: Path) -> None:
    kernels = found("compiled", tmp_path)
    assert {each["capability"] for each in kernels} == {80, 90}
    assert all(each["registers"] > 0 and each["stack"] == 0 for each in kernels), kernels


def lopsided(rows: int, cols: int) -> torch.Tensor:
    """Positive numbers, one of which is far above the others: zero points lie at an end, and most of a sum cancels."""
    W = torch.rand(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.004
    W[:, 0] = 1.0
    return W


@pytest.mark.parametrize("name", ["int8", "int8-asym", "int8:f32", "int4", "int4-asym", "int2", "int7", "int7-asym"])
@pytest.mark.parametrize("spread", [False, True])
def test_torchs_product_of_integers_is_that_of_the_decoded_matrix(
    name: str, spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(48, 2000, generator=generator) if spread else lopsided(48, 2000)
    packed = pack(nearest(W, grid_named(name)))
    matrix = _matrix(packed, packed.form)
    codes, scale = quantize_rows(torch.randn(3, 20, 2000, generator=generator).abs())
    bias = torch.randn(48, generator=generator)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)  # the way that products take there
    monkeypatch.setattr(ops, "_gpu", lambda: None)
    monkeypatch.setattr(library, "NATIVE", None)
    monkeypatch.setattr(reference, "linear_int8", None)
    y = linear_int8(codes, scale, packed, bias)
    D = reference.dequantize(*matrix).double()
    expected = (codes.double() @ D.T) * scale.double() + bias
    bound = (codes.double().abs() @ D.abs().T) * scale.double() + bias.abs()
    assert ((y.double() - expected).abs() <= 1e-6 * bound).all()


@pytest.mark.parametrize("name", ["q4_0", "fp8", "kmeans8"])
def test_it_is_left_to_others_where_levels_are_no_integers_or_scales_are_of_groups(name: str) -> None:
    packed = pack(nearest(torch.randn(48, 256), grid_named(name)))
    codes, scale = quantize_rows(torch.randn(20, 256))
    matrix = _matrix(packed, packed.form)
    assert reference.linear_of_integers(codes, scale, None, torch.float32, *matrix) is None
