import pytest
import torch

from whit.products import coarse_products, has_bfloat16


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
