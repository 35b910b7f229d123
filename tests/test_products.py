import pytest
import torch
from torch import nn
from torch.nn import functional as F

from whit import products
from whit.products import coarse_products, fast_linear, has_bfloat16, linear

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As where MKL is slow; gives the shapes of x in the products that oneDNN has computed since."""
    seen: list[tuple[int, ...]] = []
    real = torch.ops.mkldnn._linear_pointwise

    def counted(x: torch.Tensor, *others: object) -> torch.Tensor:
        seen.append(tuple(x.shape))
        found: torch.Tensor = real(x, *others)
        return found

    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return seen


@ONEDNN
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 5, 64), (600, 65)])
@pytest.mark.parametrize("rows", [1, 31, 128])
@pytest.mark.parametrize("with_bias", [False, True])
def test_both_libraries_are_exact(shape: tuple[int, ...], rows: int, with_bias: bool, onednn: list) -> None:
    torch.manual_seed(0)
    x, W = torch.randn(shape), torch.randn(rows, shape[-1])
    bias = torch.randn(rows) if with_bias else None
    exact = F.linear(x.double(), W.double(), None if bias is None else bias.double())
    bound = F.linear(x.abs(), W.abs(), None if bias is None else bias.abs())
    assert ((linear(x, W, bias) - exact).abs() <= 2e-6 * bound).all()
    assert onednn == [shape]
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert ((linear(strided, W, bias) - exact).abs() <= 2e-6 * bound).all()


@ONEDNN
def test_what_onednn_does_not_do_is_left_to_torch(onednn: list) -> None:
    x, W = torch.randn(6, 8), torch.randn(4, 8, requires_grad=True)
    linear(x, W).sum().backward()
    assert torch.allclose(W.grad, x.sum(0).expand(4, 8))
    with torch.no_grad():
        assert linear(x[:0], W).shape == (0, 4)
        assert linear(x[0], W).shape == (4,)
        assert linear(x.double(), W.double()).dtype == torch.float64
        assert linear(x.bfloat16(), W.bfloat16()).dtype == torch.bfloat16
        assert linear(x.to("meta"), W.to("meta")).is_meta
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, W).dtype == torch.bfloat16
        with coarse_products():
            linear(x, W)
    assert len(onednn) == (0 if has_bfloat16() else 1)


@ONEDNN
def test_modules_use_it_while_the_context_lasts_and_learn_as_ever(onednn: list) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 8, bias=False)), torch.randn(3, 10, 64)
    with torch.no_grad():
        expected = module(x)
        assert onednn == []
        with fast_linear():
            assert torch.allclose(module(x), expected, atol=1e-6)
        assert onednn == [(3, 10, 64), (3, 10, 96)]
        module(x)
    with fast_linear():
        module(x).sum().backward()
    assert all(each.grad is not None for each in module.parameters())
    assert len(onednn) == 2


def test_nothing_happens_where_mkl_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    x, W = torch.randn(6, 8), torch.randn(4, 8)
    with fast_linear():
        assert torch.equal(F.linear(x, W), linear(x, W))


def test_products_are_coarse_while_the_context_lasts_and_exact_again_after_it() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(64, 256, generator=generator), torch.randn(256, 64, generator=generator)
    exact = A.double() @ B.double()
    with coarse_products():
        assert (A @ B - exact).norm() < 4e-3 * exact.norm()
    assert (A @ B - exact).norm() < 1e-6 * exact.norm()


def test_precision_returns_after_an_error() -> None:
    def fail() -> None:
        with coarse_products():
            assert (torch.get_float32_matmul_precision() == "medium") == has_bfloat16()
            raise ValueError("stop")

    before = torch.get_float32_matmul_precision()
    with pytest.raises(ValueError, match="stop"):
        fail()
    assert torch.get_float32_matmul_precision() == before
