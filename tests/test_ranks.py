"""Sharing out, and one process alone; several are in tests/pipeline/test_helper.py."""

import torch

from whit.ranks import ALONE, Ranks, shared_out


def test_parts_cover_everything_once_and_in_order() -> None:
    for size in (1, 2, 3, 4, 5, 11):
        parts = [Ranks(rank, size).part(8) for rank in range(size)]
        assert [n for part in parts for n in part] == list(range(8))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_dearest_items_go_to_different_ranks_and_the_load_is_even() -> None:
    costs = [1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 5.0, 4.0]
    owners = shared_out(costs, 2)
    assert owners[1] != owners[3]
    assert sum(cost for cost, owner in zip(costs, owners, strict=True) if owner) == sum(costs) / 2
    assert shared_out(costs, 1) == [0] * 8


def test_one_process_alone_talks_to_nobody() -> None:
    assert ALONE.said({"a": 1}) == {"a": 1}
    assert ALONE.given({}) == {}


def test_an_item_is_made_ready_and_computed_by_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)

    def ready(n: int) -> int:
        return 10 * n + torch.get_num_threads()

    try:
        found = ALONE.spread(lambda n: {"n": torch.tensor([n])}, [1, 2], float, ready)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert [int(each["n"]) for each in found] == [11, 21]
