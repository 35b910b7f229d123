"""Work spread over processes: order, threads, errors."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from whit.parallel import CAN_FORK, MOST, spread


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def square(i: int) -> dict[str, Tensor]:
    x = torch.full((2, 3), float(i))
    return {"square": x * x, "codes": x.to(torch.uint8), "where": torch.tensor([os.getpid(), torch.get_num_threads()])}


def test_results_come_in_order_from_several_processes_of_one_thread() -> None:
    found = spread(square, range(50), cost=float)
    assert [each["square"][0, 0].item() for each in found] == [i * i for i in range(50)]
    assert all(each["codes"].dtype == torch.uint8 and each["codes"].shape == (2, 3) for each in found)
    assert {int(each["where"][1]) for each in found} == {1}
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(not CAN_FORK, reason="one process on this system")
def test_every_process_gets_some_of_slow_work() -> None:
    def slow(i: int) -> dict[str, Tensor]:
        for _ in range(200):
            torch.randn(100, 100) @ torch.randn(100, 100)
        return square(i)

    assert len({int(each["where"][0]) for each in spread(slow, range(60))}) == 3


@pytest.mark.parametrize("n", [0, 1, 2, MOST + 1])
def test_any_number_of_items(n: int) -> None:
    found = spread(lambda i: {"i": torch.tensor([i])}, range(n))
    assert [int(each["i"]) for each in found] == list(range(n))


def test_an_error_is_raised_as_it_is_and_leaves_the_threads_as_they_were() -> None:
    def fussy(i: int) -> dict[str, Tensor]:
        if i == 7:
            raise OverflowError("seven is too large")
        return square(i)

    with pytest.raises(OverflowError, match="seven is too large"):
        spread(fussy, range(20))
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(not CAN_FORK, reason="one process on this system")
def test_what_a_process_did_not_live_to_tell_is_done_again() -> None:
    parent = os.getpid()

    def deadly(i: int) -> dict[str, Tensor]:
        if os.getpid() != parent:
            os._exit(9)
        return square(i)

    assert [each["square"][0, 0].item() for each in spread(deadly, range(9))] == [i * i for i in range(9)]


def test_bfloat16_half_and_eight_bit_scales_come_back_as_they_were() -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.int8, torch.float64]
    found = spread(lambda dtype: {"x": torch.tensor([1.0, 2.0, 4.0]).to(dtype)[1:]}, dtypes)
    assert [each["x"].dtype for each in found] == dtypes
    assert all(each["x"].float().tolist() == [2, 4] for each in found)
