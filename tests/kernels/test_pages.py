import itertools
import sys
from copy import deepcopy

import pytest
import torch

from whit.kernels.pages import PAGE, together

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")


def several() -> list[torch.Tensor]:
    return [
        torch.randint(0, 256, (3, PAGE - 7), dtype=torch.uint8),
        torch.randn(5, 7).half(),
        torch.empty(0, 4),
        torch.tensor(3.0),
        torch.randn(33).to(torch.float8_e4m3fn),
        torch.randn(PAGE // 8).bfloat16(),
    ]


@LINUX
def test_copies_are_equal_and_do_not_touch() -> None:
    originals = several()
    found = together(originals)
    for one, other in zip(originals, found, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
        assert other.untyped_storage().nbytes() == other.nbytes
        assert other.storage_offset() == 0
    ranges = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in found if each.nbytes)
    assert ranges[0][0] % PAGE == 0
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


@LINUX
def test_one_copy_outlives_the_others() -> None:
    originals = several()
    last = together(originals)[0]
    together(originals)
    assert torch.equal(last, originals[0])
    assert torch.equal(deepcopy(last), last)
    last.zero_()
    assert originals[0].any()


def test_a_few_bytes_stay_where_they_are() -> None:
    originals = several()[1:5]
    assert all(one is other for one, other in zip(originals, together(originals), strict=True))
