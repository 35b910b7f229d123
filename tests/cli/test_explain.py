"""`whit explain` from the command line."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from whit.cli import explain
from whit.cli.explain import parse_number
from whit.errors import RecipeError

app = typer.Typer()
app.command(context_settings=explain.CONTEXT_SETTINGS)(explain.command)


def printed(*arguments: str) -> str:
    """What the command prints at a width of 80."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def figures(*arguments: str) -> dict[str, Any]:
    """What the command prints with --json."""
    return json.loads(printed(*arguments, "--json"))


def test_3_14159_shows_sign_exponent_and_mantissa_apart() -> None:
    output = printed("3.14159")
    assert "0 10000000 10010010000111111010000" in output
    assert "0 10000 1001001000 " in output
    assert "0 10000000 1001001 " in output
    assert "0 1000 101 " in output
    assert "0 10000 10 " in output


def test_every_format_says_what_it_is_good_for() -> None:
    good_for = printed("3.14159").split("good for")[1]
    for name in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int4"):
        assert name in good_for


@pytest.mark.parametrize(
    "value", ["3.14159", "-1.2345678e-45", "1e39", "inf", "nan", "-0.0", "-2.2250738585072014e-308"]
)
def test_nothing_is_cut_off_at_80_columns(value: str) -> None:
    output = printed(value, "--range", "-1.2345678e-38", "3.3e38")
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= 80


def test_json_agrees_with_torch() -> None:
    shown = figures("3.14159")
    for name in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        stored = torch.tensor(3.14159).to(getattr(torch, name)).double().item()
        assert shown[f"{name}_stored"] == stored
        assert shown[f"{name}_absolute_error"] == abs(stored - 3.14159)


def test_without_a_range_it_is_symmetric_and_just_wide_enough() -> None:
    shown = figures("-3.14159")
    assert (shown["int8_symmetric_low"], shown["int8_symmetric_high"]) == (-3.14159, 3.14159)
    assert shown["int8_symmetric_code"] == -127
    assert "no --range given" in printed("-3.14159")


def test_a_given_range_is_used_for_all_integer_codes() -> None:
    shown = figures("3.14159", "--range", "-1", "4")
    assert shown["int8_symmetric_code"] == round(3.14159 / 4 * 127)
    assert shown["int4_symmetric_code"] == round(3.14159 / 4 * 7)
    assert shown["int8_asymmetric_code"] == round(3.14159 / (5 / 255)) + 51
    assert shown["int4_asymmetric_code"] == round(3.14159 / (5 / 15)) + 3


def test_a_value_outside_the_range_is_called_clipped() -> None:
    assert "clipped" in printed("3.14159", "--range", "-1", "1")
    assert figures("3.14159", "--range", "-1", "1")["int4_symmetric_clipped"]


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        ("nan", "float16_kind", "nan"),
        ("inf", "float8_e5m2_stored", "inf"),
        ("-inf", "float8_e4m3fn_stored", -448.0),
        ("-0.0", "float32_bits", "1" + "0" * 31),
        ("1e-45", "float32_kind", "subnormal"),
        ("1e-45", "float16_kind", "underflow"),
        ("65504", "float16_absolute_error", 0.0),
        ("1e39", "float32_kind", "overflow"),
        ("1e39", "float32_absolute_error", "inf"),
        ("0x1.8p1", "float32_stored", 3.0),
        ("-0x41", "bfloat16_stored", -65.0),
    ],
)
def test_unusual_numbers_are_accepted(value: str, key: str, expected: object) -> None:
    assert figures(value)[key] == expected


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_has_no_integer_code_says_so(value: str) -> None:
    assert "Integers" in printed(value)
    assert "int8_symmetric_code" not in figures(value)


def test_json_is_strict_even_for_nan() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(printed("nan", "--json"), parse_constant=refuse)


@pytest.mark.parametrize("text", ["abc", "", "1e400", "1e-400", "0x1p5000", "0xzz", "1,5"])
def test_what_is_no_number_is_refused_with_exit_status_2(text: str) -> None:
    result = CliRunner().invoke(app, [text])
    assert isinstance(result.exception, RecipeError)
    assert result.exception.exit_status == 2


@pytest.mark.parametrize("range_", [("1", "-1"), ("0", "inf"), ("nan", "1"), ("a", "1")])
def test_a_range_without_sense_is_refused(range_: tuple[str, str]) -> None:
    assert isinstance(CliRunner().invoke(app, ["1", "--range", *range_]).exception, RecipeError)


@pytest.mark.parametrize("text", ["0", "-0.0", "0x0p0", "0e5", "0_0.0"])
def test_written_zeros_are_zero(text: str) -> None:
    assert parse_number(text) == 0
    assert math.copysign(1, parse_number(text)) == (-1 if text.startswith("-") else 1)
