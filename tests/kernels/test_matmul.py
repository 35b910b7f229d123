"""Products against plain float64 ones of the decoded matrix, with every kernel that this processor has."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from whit.grids.codebook import Codebook
from whit.grids.named import GRIDS, grid_named
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import Offset, PerChannel, PerGroup, PerTensor, Scaled, integer_grid
from whit.grids.sparse import Sparse
from whit.kernels import library, matmul, reference
from whit.kernels.form import Kind
from whit.kernels.matmul import dequantize, linear, linear_int8, linear_rounded, native, quantize_rows, rows
from whit.kernels.packed import Packed, pack, unpack
from whit.rounding.nearest import nearest

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# One of each kind of levels, offset, scale dtype and unit.
SOME = (
    "int2-g32", "int3-g64-asym", "q4_0", "q4_1", "int4-g128-asym", "int4", "int4-tensor", "iq4_nl", "mxfp4", "nvfp4",
    "q5_0", "q5_1", "int6-g64-asym", "int7", "q8_0", "int8", "int8-asym", "tq1_0", "tq2_0", "fp8",
    "q4_0:bf16", "int8:f32",
    *(name for name in ("nf4-g64", "kmeans2", "kmeans3", "kmeans4", "fp8-e5m2") if name in GRIDS),
    "kmeans4-g64", "kmeans3+2%",
)  # fmt: skip


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed_of(name: str, n_rows: int, cols: int, seed: int = 0) -> tuple[Packed, Tensor]:
    grid = grid_named(name)
    W = torch.randn(n_rows, cols, generator=generator(seed)) * 0.05
    params = grid.store(grid.fit(W))
    q = QuantizedTensor(grid, (n_rows, cols), grid.round(W, params), params)
    return pack(q), q.dequantize()


def activations(m: int, cols: int, seed: int = 1) -> Tensor:
    return torch.randn(m, cols, generator=generator(seed))


def added(packed: Packed, W: Tensor) -> Tensor:
    """Magnitudes of what a weight is the sum of [rows, cols]: a level and an outlier beside it may cancel."""
    outliers = torch.zeros(W.shape, dtype=torch.float64)
    if "values" in packed.buffers:
        outliers.scatter_(1, packed.buffers["columns"].long(), packed.buffers["values"].double())
    return (W.double() - outliers).abs() + outliers.abs()


def assert_linear(x: Tensor, packed: Packed, W: Tensor) -> None:
    """Within 1e-5 of the sum of magnitudes, plus what fixed point may lose of a segment's largest x."""
    found, expected = linear(x, packed), x.double() @ W.double().T
    assert found.dtype == x.dtype
    magnitudes = x.double().abs() @ added(packed, W).T
    tolerance = magnitudes * (1e-5 if x.dtype == torch.float32 else 2**-8)
    minimum = packed.buffers.get("minimum")
    if minimum is not None:  # scale * level and the minimum may cancel
        tolerance = tolerance + 1e-6 * x.double().abs().sum(-1, keepdim=True) * minimum.double().abs().max()
    largest = x.double().abs().amax(-1, keepdim=True)
    tolerance = tolerance + 2**-22 * largest * W.double().abs().sum(-1)
    assert ((found.double() - expected).abs() <= tolerance + 1e-30).all()


def assert_int8(q: Tensor, scale: Tensor, packed: Packed, W: Tensor, bound: float = 1e-6) -> None:
    x = q.double() * scale.double()
    found, expected = linear_int8(q, scale, packed, None, torch.float32), x @ W.double().T
    tolerance = bound * (x.abs() @ added(packed, W).T)
    minimum = packed.buffers.get("minimum")
    if minimum is not None:
        tolerance = tolerance + 1e-6 * x.abs().sum(-1, keepdim=True) * minimum.double().abs().max()
    assert ((found.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("name", SOME)
def test_products_are_those_of_the_decoded_matrix(kernels: str, name: str) -> None:
    packed, W = packed_of(name, 90, 768)
    for m in (1, 2, 3, 4, 7, 17, 100):
        x = activations(m, 768)
        for dtype in FLOATS:
            assert_linear(x.to(dtype), packed, W)
        assert_int8(*quantize_rows(x), packed, W)


@pytest.mark.parametrize("name", ["q4_0", "int8-asym", "nf4-g64", "kmeans3+2%"])
@pytest.mark.parametrize("m", [1, 40])
def test_a_product_that_torch_knows_of_has_the_same_bits(kernels: str, name: str, m: int) -> None:
    packed, _ = packed_of(name, 90, 768)
    x, bias = activations(m, 768), torch.randn(90)

    def products() -> tuple[Tensor, ...]:
        codes, scale = quantize_rows(x)
        return linear(x, packed, bias), linear(x.bfloat16(), packed), codes, linear_int8(codes, scale, packed, bias)

    with torch.no_grad():
        unwatched = products()
        with Seen() as seen:
            assert all(torch.equal(*each) for each in zip(products(), unwatched, strict=True))
    assert all(torch.equal(*each) for each in zip(products(), unwatched, strict=True))
    assert {name for name in seen.names if name.startswith("whit")} == {
        "whit::linear", "whit::linear_int8", "whit::quantize_rows",
    }  # fmt: skip


class Seen(TorchDispatchMode):
    """Names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_product_without_gradients_is_seen_by_whoever_watches() -> None:
    packed, _ = packed_of("q4_0", 32, 64)
    x = activations(2, 64)
    with torch.no_grad():
        traced = make_fx(lambda x: linear(x, packed))(x)
        found = torch.vmap(lambda row: linear(row, packed))(x)
    assert torch.equal(found, linear(x, packed))
    other = activations(2, 64, seed=3)
    assert torch.equal(traced(other), linear(other, packed))


@pytest.mark.parametrize("name", ["q4_0", "int8-asym", "kmeans4"])
def test_tensors_that_move_are_found_again(name: str) -> None:
    packed, _ = packed_of(name, 32, 64)
    other, _ = packed_of(name, 32, 64, seed=5)
    x = activations(1, 64)
    with torch.no_grad():
        first = linear(x, packed)
        for key, value in other.buffers.items():
            packed.buffers[key].set_(value.clone())
        assert torch.equal(linear(x, packed), linear(x, other))
        assert not torch.equal(linear(x, packed), first)
        assert torch.equal(linear(x, deepcopy(packed)), linear(x, other))


@pytest.mark.parametrize("name", SOME)
def test_decoding_is_the_grids_own_bit_for_bit(kernels: str, name: str) -> None:
    packed, W = packed_of(name, 90, 768)
    for dtype in FLOATS:
        assert torch.equal(dequantize(packed, dtype), W.to(dtype))
    index = torch.tensor([[0, 89, 5], [5, 17, 16]])
    assert torch.equal(rows(packed, index, torch.float32), W[index])


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "iq3_s", "bf16", "q3_k"])
def test_grids_without_a_kernel_work_too(kernels: str, name: str) -> None:
    packed, W = packed_of(name, 5, 512)
    assert packed.form.kind is Kind.PLAIN
    x = activations(3, 512)
    torch.testing.assert_close(linear(x, packed), x @ W.T)
    assert torch.equal(dequantize(packed, torch.float32), W)
    assert torch.equal(rows(packed, torch.tensor([4, 0]), torch.bfloat16), W[[4, 0]].bfloat16())
    q, scale = quantize_rows(x)
    torch.testing.assert_close(linear_int8(q, scale, packed, None, torch.float32), (q * scale) @ W.T)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_group_and_extreme_code(kernels: str, data: st.DataObject) -> None:
    n_bits = data.draw(st.integers(2, 8))
    n_rows, m = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 20))
    group = data.draw(st.sampled_from([16, 32, 48, 96, 160, 256]))
    cols = group * data.draw(st.integers(1, 4)) if data.draw(st.booleans()) else data.draw(st.integers(1, 300))
    scheme = PerGroup(group) if cols % group == 0 else PerChannel()
    offset = data.draw(st.sampled_from(["symmetric", "zero", "minimum"]))
    dtype = data.draw(st.sampled_from(FLOATS))
    grid = integer_grid(n_bits, scheme, symmetric=offset == "symmetric", scale_dtype=dtype)
    if offset == "minimum":
        grid = Scaled(grid.levels if grid.levels.low == 0 else integer_grid(n_bits, scheme, False).levels, scheme,
                      Offset.MINIMUM, dtype)  # fmt: skip
    seed = data.draw(st.integers(0, 1000))
    edges = data.draw(st.booleans())
    top = 2**n_bits
    g = generator(seed)
    codes = torch.randint(0, 2, (n_rows, cols), generator=g) * (top - 1) if edges else torch.randint(
        0, top, (n_rows, cols), generator=g)  # fmt: skip
    params = {}
    for name, spec in grid.schema((n_rows, cols)).items():
        if name == "zero":
            params[name] = torch.randint(0, top + (n_bits < 8), spec.shape, generator=g).to(torch.uint8)
        else:
            params[name] = (torch.randn(spec.shape, generator=g) * 0.1).to(spec.dtype)
    q = QuantizedTensor(grid, (n_rows, cols), codes.to(torch.uint8), params)
    packed, W = pack(q), q.dequantize()
    assert torch.equal(dequantize(packed, torch.float32), W)
    x = activations(m, cols, seed) * 10.0 ** data.draw(st.integers(-20, 20))
    assert_linear(x, packed, W)
    q = torch.randint(-128, 128, (m, cols), generator=g).to(torch.int8)
    assert_int8(q, torch.rand(m, 1, generator=g), packed, W)


def tables_of(data: st.DataObject) -> tuple[QuantizedTensor, Tensor]:
    """A matrix with tables of rows, groups or the whole, perhaps with outliers, and what it stands for, in float32."""
    n_bits, n_rows = data.draw(st.sampled_from([2, 3, 4, 8])), data.draw(st.integers(1, 40))
    size = data.draw(st.sampled_from([32, 64, 96, 160] if n_bits == 8 else [16, 32, 48, 64, 80, 128]))
    scheme = data.draw(st.sampled_from([PerChannel(), PerTensor(), PerGroup(size)]))
    cols = size * data.draw(st.integers(1, 4)) if isinstance(scheme, PerGroup) else data.draw(st.integers(1, 300))
    grid: Codebook | Sparse = Codebook(n_bits, scheme)
    if not isinstance(scheme, PerTensor) and data.draw(st.booleans()):
        grid = Sparse(grid, data.draw(st.sampled_from([0.001, 0.02, 0.1])))
    g, top = generator(data.draw(st.integers(0, 1000))), 2**n_bits
    edges = data.draw(st.booleans())
    codes = torch.randint(0, 2 if edges else top, (n_rows, cols), generator=g) * (top - 1 if edges else 1)
    params = {}
    for name, spec in grid.schema((n_rows, cols)).items():
        numbers = torch.randn(spec.shape, generator=g) * 10.0 ** data.draw(st.integers(-6, 3))
        if name == "columns":
            numbers = torch.rand(n_rows, cols, generator=g).argsort(1)[:, : spec.shape[1]].sort(1).values
        params[name] = numbers.to(spec.dtype)
    W = torch.empty(n_rows, cols)
    shared = 1 if isinstance(scheme, PerTensor) else n_rows
    tables = params["levels"].float().reshape(shared, -1, top)
    for row in range(n_rows):
        for first in range(0, cols, size if isinstance(scheme, PerGroup) else cols):
            last = first + size if isinstance(scheme, PerGroup) else cols
            W[row, first:last] = tables[row % shared, first // size if tables.shape[1] > 1 else 0][
                codes[row, first:last]
            ]
        if "columns" in params:
            W[row, params["columns"][row].long()] += params["values"][row].float()
    return QuantizedTensor(grid, (n_rows, cols), codes.to(torch.uint8), params), W


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tables_groups_and_outliers(kernels: str, data: st.DataObject) -> None:
    q, W = tables_of(data)
    (n_rows, cols), packed = q.shape, pack(q)
    packed.check()
    assert packed.form.kind is Kind.ROWS
    back = unpack(packed)
    assert torch.equal(back.codes, q.codes)
    assert all(torch.equal(back.params[name], value) for name, value in q.params.items())
    for dtype in FLOATS:
        assert torch.equal(dequantize(packed, dtype), W.to(dtype))
    g = generator(data.draw(st.integers(0, 1000)))
    index = torch.randint(0, n_rows, (2, 3), generator=g)
    assert torch.equal(rows(packed, index), W[index])
    m = data.draw(st.one_of(st.integers(1, 9), st.just(100)))
    x = activations(m, cols) * 10.0 ** data.draw(st.integers(-20, 20))
    assert_linear(x, packed, W)
    if m < 10 and kernels != "none":  # torch rounds weights as well, and what one outlier outweighs does not even out
        assert_linear(x.bfloat16(), packed, W)
    codes = torch.randint(-128, 128, (m, cols), generator=g).to(torch.int8)
    assert_int8(codes, torch.rand(m, 1, generator=g), packed, W, 1e-5)  # levels that are no integers: float32


@pytest.mark.parametrize("name", ["kmeans4-g64", "kmeans8", "kmeans3+2%"])
def test_tables_are_not_decoded_for_a_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.NATIVE is None:
        pytest.skip("the package was built without a compiler")
    packed, W = packed_of(name, 20, 256)
    monkeypatch.setattr(reference, "dequantize", None)
    monkeypatch.setattr(matmul, "_decoded", None)
    monkeypatch.setattr(library.NATIVE, "_decode", None)
    assert_linear(activations(4, 256), packed, W)


@pytest.mark.parametrize("name", ["q4_0", "int8-asym", "iq4_nl"])
def test_many_rows_of_integers_are_not_decoded_either(kernels: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of decoded matrices in float32 took four times as long where there are no tile units."""
    if kernels in ("none", "generic"):
        pytest.skip("plain loops are slower than torch's product")
    monkeypatch.setattr(library.Native, "_slabs", None)
    packed, W = packed_of(name, 48, 256)
    assert_int8(*quantize_rows(activations(300, 256)), packed, W)


@pytest.mark.parametrize("name", ["q4_0", "int8", "nf4-g64" if "nf4-g64" in GRIDS else "fp8"])
def test_what_is_not_finite_stays_so(kernels: str, name: str) -> None:
    packed, W = packed_of(name, 20, 256)
    x = activations(3, 256)
    x[1, 7] = float("nan")
    x[2, 9] = float("inf")
    y = linear(x, packed)
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1]).all()
    assert not torch.isfinite(y[2]).any()
    assert torch.equal(y[2][W[:, 9] > 0], torch.full_like(y[2][W[:, 9] > 0], float("inf")))


def test_many_rows_of_x_that_are_not_finite_stay_so_too(kernels: str) -> None:
    packed, _ = packed_of("q4_0", 20, 256)
    x = activations(30, 256)
    x[17, 3] = float("nan")
    y = linear(x, packed)
    assert torch.isnan(y[17]).all()
    assert torch.isfinite(y[torch.arange(30) != 17]).all()


def test_long_rows_do_not_overflow_the_integers(kernels: str) -> None:
    grid, cols = GRIDS["int8-asym"], 20000
    codes = torch.full((3, cols), 255, dtype=torch.uint8)
    params = {"scale": torch.ones(3, 1, dtype=torch.float16), "zero": torch.tensor([[0], [128], [255]]).to(torch.uint8)}
    packed = pack(QuantizedTensor(grid, (3, cols), codes, params))
    q = torch.full((1, cols), -128, dtype=torch.int8)
    found = linear_int8(q, torch.ones(()), packed, None, torch.float32)
    assert torch.equal(found, torch.tensor([[-128.0 * 255 * cols, -128.0 * 127 * cols, 0.0]]))
    torch.testing.assert_close(linear(torch.ones(1, cols), packed), torch.tensor([[255.0 * cols, 127.0 * cols, 0.0]]))


def test_bias_scalar_scale_and_leading_dimensions(kernels: str) -> None:
    packed, W = packed_of("q4_0", 33, 128)
    x, bias = activations(6, 128).view(2, 3, 128), torch.randn(33, generator=generator(2))
    torch.testing.assert_close(linear(x, packed, bias), x @ W.T + bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear(x[0, 0], packed), x[0, 0] @ W.T, rtol=1e-4, atol=1e-5)
    q = torch.randint(-127, 128, (2, 3, 128), generator=generator(3)).to(torch.int8)
    expected = (q * 0.02) @ W.T + bias
    found = linear_int8(q, torch.tensor(0.02), packed, bias, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert linear_int8(q, torch.tensor(0.02), packed, bias, torch.bfloat16).dtype == torch.bfloat16
    assert linear(x[:0], packed).shape == (0, 3, 33)


def test_x_need_not_be_contiguous(kernels: str) -> None:
    packed, W = packed_of("q4_0", 16, 128)
    x = activations(128, 4).T
    torch.testing.assert_close(linear(x, packed), x @ W.T, rtol=1e-4, atol=1e-5)


def test_rows_are_quantized_to_the_nearest_code_halves_to_even(kernels: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    q, scale = quantize_rows(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -127], [0] * 6]
    assert scale.tolist() == [[1.0], [1.0]]
    for dtype in FLOATS:
        x = (activations(5, 333) * 3).to(dtype)
        q, scale = quantize_rows(x)
        expected = x.float().abs().amax(-1, keepdim=True) / 127
        assert torch.equal(scale, expected)
        assert torch.equal(q, (x.float() / expected).round().to(torch.int8))


@pytest.mark.parametrize("name", ["int4-g32-asym", "kmeans3-g32", "kmeans4+3%"])
def test_gradients_reach_x_and_bias(kernels: str, name: str) -> None:
    packed, W = packed_of(name, 24, 64)
    x = activations(5, 64).requires_grad_()
    bias = torch.zeros(24, requires_grad=True)
    weight = torch.randn(5, 24, generator=generator(5))
    (linear(x, packed, bias) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight @ W, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias.grad, weight.sum(0))


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed, _ = packed_of("q4_0", 16, 64)
    with pytest.raises((ValueError, RuntimeError)):
        linear(activations(2, 32), packed)
    with pytest.raises((ValueError, RuntimeError)):
        linear(activations(2, 64), packed, torch.zeros(15))
    with pytest.raises((ValueError, RuntimeError)):
        linear_int8(torch.zeros(3, 64, dtype=torch.int8), torch.ones(2), packed, None, torch.float32)


def test_an_index_out_of_range_is_refused(kernels: str) -> None:
    packed, _ = packed_of("q4_0", 16, 64)
    with pytest.raises(IndexError):
        rows(packed, torch.tensor([16]), torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["q4_0", "int8", "nf4-g64", "kmeans4-g64", "q4_k"])
@pytest.mark.parametrize("shape", [(0, 256), (256,), (1, 1, 256), (2, 3, 256), (20, 256)])
def test_x_put_in_int8_on_the_way(kernels: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    packed, _ = packed_of(name, 48, 256)
    x, scale = torch.randn(shape, generator=generator(5)).to(dtype), torch.tensor(0.013)  # of which some are cut off
    codes = (x.float() / scale).round().clamp(-127, 127).to(torch.int8)
    for bias in (None, torch.randn(48, generator=generator(6))):
        found = linear_rounded(x, None, packed, bias)
        assert found.dtype == dtype
        assert torch.equal(found, linear_int8(*quantize_rows(x), packed, bias, dtype))
        assert torch.equal(linear_rounded(x, scale, packed, bias), linear_int8(codes, scale, packed, bias, dtype))


@pytest.mark.parametrize("name", ["q4_0", "int8", "q5_1", "kmeans4-g64"])
@pytest.mark.parametrize("m", [1, 3])  # one row may be served by functions of several tiles
def test_threads_do_not_change_a_bit(kernels: str, name: str, m: int) -> None:
    packed, _ = packed_of(name, 528, 512)
    x, before = activations(m, 512), torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        half = linear(x.bfloat16(), packed)
        results.append([linear(x, packed), half, linear_int8(*quantize_rows(x), packed, None, torch.float32)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Layer(nn.Module):
    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.grid, self.shape, self.names = packed.grid, packed.shape, list(packed.buffers)
        for name, value in packed.buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        packed = Packed(self.grid, self.shape, {name: getattr(self, name) for name in self.names})
        q, scale = quantize_rows(x)
        return linear(x, packed) + linear_int8(q, scale, packed, None, x.dtype)


@pytest.mark.parametrize("name", ["q4_0", "fp8", "int8", "q4_k", "kmeans4-g64", "kmeans3+1%"])
def test_a_module_compiles_and_exports_whole(name: str) -> None:
    torch._dynamo.reset()
    layer, x = Layer(packed_of(name, 32, 256)[0]), activations(3, 256)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), layer(x))


@pytest.mark.parametrize("name", ["q4_0", "kmeans2+3%"])
@pytest.mark.parametrize("operator", ["linear", "linear_int8", "dequantize", "rows"])
def test_operators_state_their_results_truly(operator: str, name: str) -> None:
    from whit.kernels.matmul import _matrix

    packed, _ = packed_of(name, 32, 64)
    x = activations(2, 64)
    leading = {
        "linear": (x, None),
        "linear_int8": (*quantize_rows(x), None, torch.float32),
        "dequantize": (torch.bfloat16,),
        "rows": (torch.tensor([1, 2]), torch.float32),
    }[operator]
    arguments = (*leading, *_matrix(packed, packed.form))
    torch.library.opcheck(getattr(torch.ops.whit, operator).default, arguments)


def test_the_name_of_the_kernels_is_known() -> None:
    assert native().split(",")[0] in ("none", "generic", "avx2", "avx512-vnni", "neon")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: products there are torch's own operations")
@pytest.mark.parametrize(
    "name", ["q4_0", "int8:f32", "int3-g32-asym", "nf4-g64", "kmeans4-tensor", "kmeans4-g64+1%", "q4_k"]
)
def test_a_cuda_device_computes_what_the_processor_does(name: str) -> None:
    W = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    packed = pack(nearest(W, grid_named(name)))
    moved = Packed(packed.grid, packed.shape, {key: value.cuda() for key, value in packed.buffers.items()})
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linear(x.cuda(), moved).cpu(), linear(x, packed), rtol=1e-4, atol=1e-4)
    codes, scale = quantize_rows(x)
    found = linear_int8(codes.cuda(), scale.cuda(), moved).cpu()
    torch.testing.assert_close(found, linear_int8(codes, scale, packed), rtol=1e-4, atol=1e-4)
    index = torch.tensor([[0, 95], [7, 7]])
    assert torch.equal(rows(moved, index.cuda()).cpu(), rows(packed, index))
