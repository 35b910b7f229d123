"""Attention of one token against torch's in float64, with every kernel that this processor has."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from whit.kernels import attention, library
from whit.kernels.attention import attend

# Of the largest value that may come out: float32 sums, and one rounding to the result's dtype.
ERRORS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def there(kernels: str) -> None:
    if kernels == "none":
        pytest.skip("there is no attention without native code: torch's is taken")


def made(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    found = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, scale=scale, enable_gqa=True
    )
    return found.transpose(1, 2)


def check(found: Tensor | None, wanted: Tensor, v: Tensor) -> None:
    assert found is not None
    assert found.shape == wanted.shape
    assert found.dtype == v.dtype
    assert (found - wanted).abs().max() <= ERRORS[v.dtype] * v.abs().max()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(list(ERRORS)),
    rows=st.integers(1, 3),
    key_heads=st.integers(1, 5),
    sharing=st.integers(1, 9),
    n=st.integers(1, 70),
    widths=st.tuples(*[st.sampled_from([16, 32, 48, 64, 80, 128])] * 2),
    scale=st.sampled_from([None, 0.0, 0.1, 3.0]),
    masked=st.sampled_from(["", "bool", "one", "float"]),
    threads=st.integers(1, 3),
)
def test_as_torch_in_float64(
    dtype: torch.dtype,
    rows: int,
    key_heads: int,
    sharing: int,
    n: int,
    widths: tuple[int, int],
    scale: float | None,
    masked: str,
    threads: int,
) -> None:
    width, value_width = widths
    q = made(1, rows, key_heads * sharing, 1, width, dtype=dtype)
    k, v = made(2, rows, key_heads, n, width, dtype=dtype), made(3, rows, key_heads, n, value_width, dtype=dtype)
    mask = None
    if masked:
        seen = made(4, 1 if masked == "one" else rows, 1, 1, n) > 0
        seen[..., -1] = True
        mask = torch.where(seen, made(5, *seen.shape), torch.finfo(dtype).min).to(dtype) if masked == "float" else seen
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = attend(q, k, v, mask, scale)
    torch.set_num_threads(before)
    check(found, expected(q, k, v, mask, scale), v)


@pytest.mark.parametrize("dtype", ERRORS)
def test_parts_of_a_longer_cache_and_turned_ones(dtype: torch.dtype) -> None:
    q = made(1, 2, 6, 1, 32, dtype=dtype)
    cache = made(2, 2, 2, 50, 32, dtype=dtype)
    k, turned = cache[:, :, 3:40], made(3, 2, 37, 2, 48, dtype=dtype).transpose(1, 2)
    check(attend(q, k, turned), expected(q, k, turned), turned)
    apart = made(4, 2, 6, 1, 64, dtype=dtype)[..., ::2]
    check(attend(apart, k, turned), expected(apart, k, turned), turned)


@pytest.mark.parametrize("dtype", ERRORS)
def test_large_scores_and_many_tokens(dtype: torch.dtype) -> None:
    q, k, v = (made(i, 1, 4, 1 if i == 1 else 3000, 64, dtype=dtype) for i in (1, 2, 3))
    check(attend(q * 30, k, v), expected(q * 30, k, v), v)
    check(attend(q / 30, k, v), expected(q / 30, k, v), v)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    for heads, key_heads in ((8, 8), (12, 1), (6, 2)):
        q, k, v = made(1, 1, heads, 1, 64), made(2, 1, key_heads, 700, 64), made(3, 1, key_heads, 700, 64)
        before, found = torch.get_num_threads(), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attend(q, k, v))
        torch.set_num_threads(before)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_nothing_to_see_is_zero_and_nan_stays() -> None:
    q, k, v = made(1, 2, 2, 1, 16), made(2, 2, 2, 5, 16), made(3, 2, 2, 5, 16)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1] = False
    found = attend(q, k, v, mask)
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    k[0, 0, 2, 3] = float("nan")
    found = attend(q, k, v)
    assert found[0, 0, 0].isnan().all()
    assert not found[0, 0, 1].isnan().any()
    assert not found[1].isnan().any()
    v[1, 1, 0, 0] = float("inf")
    assert attend(q, k, v)[1, 0, 1, 0] == float("inf")


def test_what_it_does_not_take() -> None:
    q, k = made(1, 1, 4, 1, 32), made(2, 1, 2, 5, 32)
    assert attend(q, k, k) is not None
    others = [
        (made(1, 1, 4, 2, 32), k, k),  # two queries
        (made(1, 1, 3, 1, 32), k, k),  # heads that do not share evenly
        (made(1, 1, 4, 1, 24), k[..., :24], k[..., :24]),
        (q.double(), k.double(), k.double()),
        (q, k.bfloat16(), k.bfloat16()),
        (q, k[:, :, :0], k[:, :, :0]),
        (q, k, k[:, :, :4]),
        (q, k, k.transpose(2, 3).contiguous().transpose(2, 3)),  # numbers of a token that lie apart
        (q, k.to("meta"), k.to("meta")),
        (q[0], k[0], k[0]),
        (q.expand(2, -1, -1, -1), k, k),
    ]
    assert [attend(*each) for each in others] == [None] * len(others)
    masks = torch.ones(1, 4, 1, 5), torch.ones(1, 1, 1, 4), torch.ones(5), torch.ones(2, 1, 1, 5)
    assert [attend(q, k, k, mask) for mask in masks] == [None] * len(masks)


def test_without_native_code_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LIBRARY", None)
    assert library.NATIVE is not None
    assert attend(made(1, 1, 4, 1, 32), made(2, 1, 2, 5, 32), made(3, 1, 2, 5, 32)) is None
