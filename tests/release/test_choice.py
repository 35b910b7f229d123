"""What is recommended, and which file is for whom."""

import pytest

from release_records import record
from whit.errors import RecipeError
from whit.release.choice import choices, pick

RECORDS = [
    record("q2", 60, 0.3),
    record("q3", 70, 0.09),
    record("q4", 80, 0.02),
    record("odd", 85, 0.05),
    record("q6", 90, 0.004),
    record("q8", 100, 0.0005),
    record("gptq", 75, 0.12, "gptq"),
    record("awq", 74, 0.11, "awq"),
]


def test_the_smallest_good_and_the_smallest_excellent_of_each_kind_are_recommended() -> None:
    found = choices(RECORDS)
    assert {file for file, each in found.items() if each.recommended} == {"q3", "q6", "gptq"} - {"gptq"} | {"awq"}


def test_what_another_beats_in_both_says_so() -> None:
    found = choices(RECORDS)
    assert "rather take q4" in found["odd"].use
    assert "rather take awq" in found["gptq"].use
    assert "rather" not in found["q2"].use
    assert all(each.use for each in found.values())


def test_the_least_loss_that_fits_is_picked_of_each_kind() -> None:
    assert [each.file for each in pick(RECORDS, 185)] == ["q6", "awq"]
    assert [each.file for each in pick(RECORDS, 145)] == ["q3"]
    assert [each.file for each in pick(RECORDS, 10**9)] == ["q8", "awq"]


def test_when_nothing_fits_the_smallest_is_named() -> None:
    with pytest.raises(RecipeError, match="q2, needs"):
        pick(RECORDS, 100)
