"""`whit explain NUMBER`: how number formats hold one number, drawn bit by bit."""

from __future__ import annotations

import json as jsonlib
import math
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from whit.errors import RecipeError
from whit.numerics import FLOAT_FORMATS, Anatomy, IntegerCode, anatomy, integer_code

# The app registers the verb with these: -3.5 is a number, not an option.
CONTEXT_SETTINGS = {"ignore_unknown_options": True}

INTEGER_BITS = (8, 4)
SIGN, EXPONENT, MANTISSA = "bold red", "bold green", "bold cyan"


def command(
    value: Annotated[str, typer.Argument(help="A number: 3.14159, -0.0, 1e-45, 0x1.8p1, inf, nan.")],
    range_: Annotated[
        tuple[str, str] | None,
        typer.Option("--range", metavar="LOW HIGH", help="Range of the weights that the integer codes cover."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Exact figures with flat keys.")] = False,
) -> None:
    """Draw how float32, float16, bfloat16, both fp8 and int8/int4 hold a number."""
    number = parse_number(value)
    floats = [anatomy(number, format) for format in FLOAT_FORMATS.values()]
    low, high = _range(number, range_)
    integers = [] if math.isnan(number) or math.isnan(low) else _integer_codes(number, low, high)
    if json:
        print(jsonlib.dumps(_flat(number, floats, integers), indent=2, allow_nan=False))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{value} in five float formats[/bold]\n")
    for table in (_bits_table(floats), _stored_table(floats), _range_table(floats)):
        console.print(table, "")
    if integers:
        source = "the range given" if range_ else f"no --range given: symmetric, just wide enough for {value}"
        console.print(f"[bold]Integer codes for weights from {low:g} to {high:g}[/bold]\n({source})\n")
        console.print(_integer_table(integers), "")
    else:
        reason = "Integers have no code for nan." if math.isnan(number) else "Integers hold no inf; --range clips it."
        console.print(reason + "\n")
    console.print(_good_for())


def parse_number(text: str) -> float:
    """The float that a person typed: decimal, hexadecimal (0x1.8p1), inf or nan.

    Raises RecipeError when it is no number, or one that even float64 cannot hold.
    """
    hexadecimal = "0x" in text.lower()
    try:
        number = float.fromhex(text) if hexadecimal else float(text)
    except OverflowError:
        number = math.inf
    except ValueError as error:
        raise RecipeError(
            f"{text!r} is not a number. Give one such as 3.14159, -0.0, 1e-45, 0x1.8p1, inf or nan."
        ) from error
    written = text.lower().removeprefix("-").removeprefix("+").removeprefix("0x")
    digits = written.split("p" if hexadecimal else "e")[0]
    if math.isinf(number) and "inf" not in written:
        raise RecipeError(f"{text} lies beyond float64, whose largest number is 1.797693e308. Give a smaller one.")
    if number == 0 and digits.strip("0._ "):
        raise RecipeError(f"{text} vanishes in float64, whose smallest number is 4.9e-324. Give a larger one.")
    return number


def _range(number: float, typed: tuple[str, str] | None) -> tuple[float, float]:
    """The range asked for, else the narrowest symmetric one; NaN when there is none."""
    if typed is None:
        most = abs(number) or 1.0
        return (-most, most) if math.isfinite(most) else (math.nan, math.nan)
    low, high = parse_number(typed[0]), parse_number(typed[1])
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise RecipeError(
            f"--range {typed[0]} {typed[1]}: two finite numbers in ascending order are needed, such as --range -1 1."
        )
    return low, high


def _integer_codes(number: float, low: float, high: float) -> list[IntegerCode]:
    return [integer_code(number, bits, low, high, symmetric=s) for bits in INTEGER_BITS for s in (True, False)]


def _name(code: IntegerCode) -> str:
    return f"int{code.bits} {'symmetric' if code.symmetric else 'asymmetric'}"


def _table(*columns: str | Text) -> Table:
    """A plain table: the first column names the row, the others are set to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for position, heading in enumerate(columns):
        table.add_column(heading, justify="right" if position else "left", no_wrap=True)
    return table


def _bits_table(floats: list[Anatomy]) -> Table:
    heading = Text.assemble(("sign", SIGN), " ", ("exponent", EXPONENT), " ", ("mantissa", MANTISSA))
    table = _table("format", heading, "kind")
    table.columns[1].justify = table.columns[2].justify = "left"
    for a in floats:
        bits = Text.assemble((a.sign, SIGN), " ", (a.exponent, EXPONENT), " ", (a.mantissa, MANTISSA))
        table.add_row(a.format.name, bits, a.kind.value)
    return table


def _stored_table(floats: list[Anatomy]) -> Table:
    table = _table("format", "stored", "that is", "error", "error %")
    for a in floats:
        errors = _error(a.absolute_error), _error(100 * a.relative_error)
        table.add_row(a.format.name, f"{a.stored:.9g}", a.formula, *errors)
    return table


def _range_table(floats: list[Anatomy]) -> Table:
    table = _table("format", "largest", "normal from", "subnormal from", "step at 1", "digits")
    for a in floats:
        f = a.format
        numbers = f.largest, f.smallest_normal, f.smallest_subnormal, f.epsilon
        table.add_row(f.name, *(f"{n:.5g}" for n in numbers), f"{f.decimal_digits:.1f}")
    return table


def _integer_table(codes: list[IntegerCode]) -> Table:
    table = _table("grid", "code", "bits", "zero", "step", "stored", "error", "")
    for c in codes:
        numbers = f"{c.step:.4g}", f"{c.stored:.5g}", _error(c.absolute_error)
        clipped = "clipped" if c.clipped else ""
        table.add_row(_name(c), str(c.code), c.bit_string, str(c.zero), *numbers, clipped)
    return table


def _good_for() -> Table:
    table = _table("format", "good for")
    table.columns[1].justify, table.columns[1].no_wrap = "left", False
    for format in FLOAT_FORMATS.values():
        table.add_row(format.name, format.good_for)
    table.add_row("int8", "Weights and activations: one scale a row is enough.")
    table.add_row("int4", "Weights: 15 or 16 values, so one scale per 32 to 128 weights.")
    return table


def _error(error: float) -> str:
    return f"{error:.3g}"


def _flat(number: float, floats: list[Anatomy], integers: list[IntegerCode]) -> dict[str, object]:
    """Flat keys, exact numbers; what JSON has no number for is the string "inf", "-inf" or "nan"."""
    flat: dict[str, object] = {"value": _plain(number)}
    for a in floats:
        f = a.format
        facts = {
            "bits": a.bits,
            "sign": a.sign,
            "exponent": a.exponent,
            "mantissa": a.mantissa,
            "kind": a.kind.value,
            "stored": a.stored,
            "absolute_error": a.absolute_error,
            "relative_error": a.relative_error,
            "largest": f.largest,
            "smallest_normal": f.smallest_normal,
            "smallest_subnormal": f.smallest_subnormal,
            "epsilon": f.epsilon,
            "decimal_digits": f.decimal_digits,
            "good_for": f.good_for,
        }
        flat |= {f"{f.name}_{key}": _plain(fact) for key, fact in facts.items()}
    for c in integers:
        facts = {
            "low": c.low,
            "high": c.high,
            "step": c.step,
            "zero": c.zero,
            "code": c.code,
            "bits": c.bit_string,
            "stored": c.stored,
            "absolute_error": c.absolute_error,
            "relative_error": c.relative_error,
            "clipped": c.clipped,
        }
        flat |= {f"{_name(c).replace(' ', '_')}_{key}": _plain(fact) for key, fact in facts.items()}
    return flat


def _plain(fact: object) -> object:
    return str(fact) if isinstance(fact, float) and not math.isfinite(fact) else fact
