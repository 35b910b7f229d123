"""Sums of amounts and laws, with rates that are made up."""

from __future__ import annotations

import pytest

from whit.pipeline.duration import Amount, Cost, Times, Work, duration, powers, rounding_law


def test_a_law_of_powers_grows_as_it_says() -> None:
    law = powers(Cost(2.0, 3.0), rows=10, cols=100, of_rows=1, of_cols=2)
    assert law(10, 100) == Cost(2.0, 3.0)
    assert law(20, 300).wall == pytest.approx(2.0 * 2 * 9)
    assert law(5, 50).cpu == pytest.approx(3.0 / 2 / 4)


@pytest.mark.parametrize("terms", [(3.0, 0.02, 0.0001), (3.0, 0.0, 0.0001), (0.0, 0.02, 0.0), (1.0, 0.5, 0.0)])
def test_three_points_give_back_the_law_that_they_lie_on(terms: tuple[float, float, float]) -> None:
    def true(rows: float, cols: float) -> float:
        return terms[0] * cols + terms[1] * rows * cols + terms[2] * rows * cols**2

    points = [
        (rows, cols, Cost(true(rows, cols), 2 * true(rows, cols))) for rows, cols in ((16, 256), (320, 256), (320, 64))
    ]
    law = rounding_law(points[0], points[1], points[2])
    for rows, cols in ((1, 32), (1024, 256), (700, 5000)):
        assert law(rows, cols).wall == pytest.approx(true(rows, cols))
        assert law(rows, cols).cpu == pytest.approx(2 * true(rows, cols))


def test_a_law_without_narrow_columns_is_right_at_its_own_and_noise_makes_no_negative_times() -> None:
    law = rounding_law((16, 256, Cost(1.0, 1.0)), (320, 256, Cost(5.0, 5.0)), (320, 256, Cost(5.0, 5.0)))
    assert law(320, 256).wall == pytest.approx(5.0)
    assert law(16, 256).wall == pytest.approx(1.0)
    noisy = rounding_law((16, 256, Cost(1.2, 0.1)), (320, 256, Cost(1.0, 5.0)), (320, 64, Cost(3.0, 0.0)))
    assert min(*(x for rows in (1, 1024) for each in [noisy(rows, 4096)] for x in (each.wall, each.cpu))) >= 0


def test_a_batch_is_shared_out_and_ends_no_earlier_than_its_dearest_item() -> None:
    laws = {"a": lambda rows, cols: Cost(rows, 2 * rows)}
    even = tuple((Amount("rounding", "a", rows=1),) for _ in range(4))
    uneven = ((Amount("rounding", "a", rows=7),), (Amount("rounding", "a", rows=1), Amount("rounding", "a", rows=1)))
    alone = Work((Amount("text", "a", rows=3, times=2),))
    assert Work((), (even,)).cost(laws, 2) == {"rounding": Cost(2, 8)}
    assert Work((), (uneven,)).cost(laws, 2) == {"rounding": Cost(7, 18)}
    both = (alone + Work((), (even, uneven))).cost(laws, 4)
    assert both == {"rounding": Cost(1 + 7, 26), "text": Cost(6, 12)}
    assert list(both) == ["rounding", "text"]


def test_kinds_are_wanted_for_their_widest_amount() -> None:
    work = Work((Amount("x", "a", cols=3), Amount("x", "a", cols=8, times=2)), (((Amount("x", "b", 5, 2),),),))
    assert work.kinds() == {"a": 8, "b": 2}
    assert work.count("a") == 3
    assert work.rows("b") == 5


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.234, "0.23 s"), (119, "119 s"), (130, "2.2 min"), (3 * 3600, "3 h"), (36 * 3600, "36 h"), (1e6, "12 days")],
)
def test_times_are_said_in_two_digits(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_person_and_a_machine_are_told_the_same() -> None:
    times = Times({"rounding": Cost(90.0, 60.0), "verdict": Cost(10.0, 5.0)}, 2)
    first, second, third = times.lines()
    assert "about 100 s on this machine, as busy as it is now (2 threads; 65 s of processors)" in first
    assert "90 % rounding, 10 % verdict" in second
    assert "--no-verify saves 10 s" in third
    assert times.flat()["seconds"] == 100.0
    assert "not known: because" in Times({}, 0, "because").lines()[0]
    assert Times({}, 0, "because").flat()["seconds"] is None
