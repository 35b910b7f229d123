import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whit.grids.levels import Integers, Table
from whit.grids.named import IQ4_NL_LEVELS


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=20))
def test_table_rounding_is_nearest_by_brute_force(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    levels = torch.tensor(IQ4_NL_LEVELS.numbers, dtype=torch.float32)
    found = (IQ4_NL_LEVELS.values(IQ4_NL_LEVELS.nearest(x)) - x).abs()
    assert torch.equal(found, (x[:, None] - levels).abs().amin(1))


def test_mirrored_integers_round_halves_away_from_zero() -> None:
    levels = Integers(8, 128, mirrored=True)
    x = torch.tensor([0.5, -0.5, 1.5, -1.5, 0.49999997, -127.6, 200.0])
    assert (levels.nearest(x).int() - 128).tolist() == [1, -1, 2, -2, 0, -127, 127]


def test_signed_integers_use_the_longer_negative_end() -> None:
    levels = Integers(4, 8)
    assert (levels.low, levels.high) == (-8, 7)
    assert levels.values(levels.nearest(torch.tensor([-8.0, 7.0, 9.0]))).tolist() == [-8, 7, 7]


@pytest.mark.parametrize("numbers", [(1.0,), (2.0, 1.0), (1.0, 1.0)])
def test_tables_must_ascend(numbers: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        Table("bad", numbers)


def test_integers_take_one_to_eight_bits() -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        Integers(9, 0)


def test_the_code_of_an_exact_level() -> None:
    assert IQ4_NL_LEVELS.index(1) == 8
    with pytest.raises(ValueError, match="not a level"):
        IQ4_NL_LEVELS.index(0)
