"""Number formats against torch's casts, torch's finfo and hand-written bit patterns."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.numerics import FLOAT_FORMATS, FloatFormat, Kind, anatomy, decode, integer_code

FORMATS = list(FLOAT_FORMATS.values())
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
EIGHT_BIT = pytest.mark.parametrize("format", [f for f in FORMATS if f.bits == 8], ids=lambda f: f.name)

INTEGER_VIEWS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
any_float32 = st.floats(width=32, allow_nan=False)
near_float8 = st.floats(-70000, 70000, width=32)


def torch_bits(value: float, format: FloatFormat) -> str:
    """The bits that torch stores when it casts a float32 to this format."""
    stored = torch.tensor([value], dtype=torch.float32).to(getattr(torch, format.name))
    return f"{stored.view(INTEGER_VIEWS[format.bits]).item() % 2**format.bits:0{format.bits}b}"


@EVERY_FORMAT
@given(value=st.one_of(any_float32, near_float8))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_bits_are_those_of_torch_casts(format: FloatFormat, value: float) -> None:
    if not format.has_infinity and abs(value) > 464:
        return  # torch stored NaN here until 2026; saturation has a test of its own
    assert anatomy(value, format).bits == torch_bits(value, format)


@EVERY_FORMAT
def test_ties_round_to_even_like_torch(format: FloatFormat) -> None:
    # halves between neighbours in [1, 2), among the subnormals, and at the very top of the range
    top = math.ldexp(1.0, format.max_exponent)
    for k in range(8):
        for unit in (format.epsilon, format.smallest_subnormal, top * format.epsilon):
            base = {format.epsilon: 1.0, format.smallest_subnormal: 0.0}.get(unit, top)
            value = base + (k + 0.5) * unit
            if value == torch.tensor(value, dtype=torch.float32).item() and (format.has_infinity or value <= 464):
                assert anatomy(value, format).bits == torch_bits(value, format)


@given(value=st.floats(allow_nan=False))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_float64_values_round_once_to_float32(value: float) -> None:
    expected = torch.tensor([value], dtype=torch.float64).to(torch.float32).view(torch.int32).item()
    assert int(anatomy(value, FLOAT_FORMATS["float32"]).bits, 2) == expected % 2**32


@EIGHT_BIT
def test_all_256_codes_of_8_bit_formats_decode_as_torch_does(format: FloatFormat) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(getattr(torch, format.name)).float().tolist()
    mine = [decode(f"{code:08b}", format) for code in range(256)]
    assert [str(x).lstrip("-") if math.isnan(x) else x for x in mine] == [
        str(x).lstrip("-") if math.isnan(x) else x for x in theirs
    ]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_all_65536_codes_of_16_bit_formats_decode_as_torch_does(name: str) -> None:
    theirs = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(getattr(torch, name)).double()
    mine = torch.tensor(
        [decode(f"{code % 65536:016b}", FLOAT_FORMATS[name]) for code in range(-32768, 32768)], dtype=torch.float64
    )
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert torch.equal(mine.nan_to_num(0).signbit(), theirs.nan_to_num(0).signbit())
    assert torch.equal(mine.nan_to_num(0), theirs.nan_to_num(0))


@EVERY_FORMAT
def test_ranges_are_those_of_torch_finfo(format: FloatFormat) -> None:
    info = torch.finfo(getattr(torch, format.name))
    assert (format.largest, format.smallest_normal, format.epsilon, format.bits) == (
        info.max,
        info.tiny,
        info.eps,
        info.bits,
    )


@EVERY_FORMAT
def test_smallest_subnormal_is_the_first_code(format: FloatFormat) -> None:
    assert decode(f"{1:0{format.bits}b}", format) == format.smallest_subnormal


@EVERY_FORMAT
def test_numbers_of_a_format_are_stored_without_error(format: FloatFormat) -> None:
    for value in (format.largest, -format.smallest_normal, format.smallest_subnormal, 1 + format.epsilon):
        mine = anatomy(value, format)
        assert (mine.stored, mine.absolute_error, mine.relative_error) == (value, 0.0, 0.0)


@EVERY_FORMAT
def test_relative_error_of_normal_numbers_is_at_most_half_epsilon(format: FloatFormat) -> None:
    worst = anatomy(1 + format.epsilon / 2, format)
    assert worst.relative_error == pytest.approx(format.epsilon / 2, rel=format.epsilon)


def test_pi_in_float32_has_the_textbook_bits() -> None:
    pi = anatomy(math.pi, FLOAT_FORMATS["float32"])
    assert (pi.sign, pi.exponent, pi.mantissa) == ("0", "10000000", "10010010000111111011011")
    assert pi.stored == 3.1415927410125732421875
    assert pi.absolute_error == float(abs(Fraction("3.1415927410125732421875") - Fraction(math.pi)))


def test_three_point_one_four_in_each_format() -> None:
    stored = {f.name: anatomy(3.14159, f).stored for f in FORMATS}
    assert stored == {
        "float32": 3.141590118408203125,
        "float16": 3.140625,
        "bfloat16": 3.140625,
        "float8_e4m3fn": 3.25,
        "float8_e5m2": 3.0,
    }


def test_65504_is_the_last_number_of_float16() -> None:
    half = FLOAT_FORMATS["float16"]
    assert anatomy(65504, half).kind is Kind.NORMAL
    assert anatomy(65519.99, half).stored == 65504
    assert anatomy(65520, half).kind is Kind.OVERFLOW
    assert anatomy(65520, half).stored == math.inf


def test_without_infinity_numbers_saturate() -> None:
    format = FLOAT_FORMATS["float8_e4m3fn"]
    assert anatomy(464, format).kind is Kind.NORMAL  # halfway to the missing 480, and 448 is even
    for value in (464.001, 1e39, math.inf):
        mine = anatomy(-value, format)
        assert (mine.kind, mine.stored, mine.absolute_error) == (Kind.SATURATED, -448, value - 448)


@EVERY_FORMAT
def test_nan_stays_nan(format: FloatFormat) -> None:
    nan = anatomy(math.nan, format)
    assert nan.kind is Kind.NAN
    assert math.isnan(nan.stored)
    assert math.isnan(nan.absolute_error)


@EVERY_FORMAT
def test_negative_zero_keeps_its_sign(format: FloatFormat) -> None:
    zero = anatomy(-0.0, format)
    assert (zero.kind, zero.bits) == (Kind.ZERO, "1" + "0" * (format.bits - 1))
    assert math.copysign(1, zero.stored) == -1
    assert zero.relative_error == 0


def test_1e_minus_45_is_the_smallest_subnormal_of_float32() -> None:
    tiny = anatomy(1e-45, FLOAT_FORMATS["float32"])
    assert tiny.kind is Kind.SUBNORMAL
    assert tiny.bits == "0" * 31 + "1"
    assert tiny.stored == 2.0**-149


def test_a_number_that_vanishes_is_called_underflow_with_all_of_it_lost() -> None:
    gone = anatomy(1e-45, FLOAT_FORMATS["float16"])
    assert (gone.kind, gone.stored, gone.relative_error) == (Kind.UNDERFLOW, 0.0, 1.0)


def test_formula_names_sign_significand_and_power() -> None:
    assert anatomy(-3.25, FLOAT_FORMATS["float8_e4m3fn"]).formula == "-1.625 x 2^1"
    assert anatomy(1e39, FLOAT_FORMATS["float32"]).formula == "+infinity"


def test_decode_refuses_a_wrong_length() -> None:
    with pytest.raises(ValueError, match="8 characters"):
        decode("0101", FLOAT_FORMATS["float8_e5m2"])


ranges = st.tuples(st.floats(-100, 100), st.floats(-100, 100)).map(sorted).filter(lambda r: r[1] - r[0] > 1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@given(value=st.floats(-150, 150), range_=ranges)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_integer_codes_agree_with_torch_fake_quantization(
    symmetric: bool, bits: int, value: float, range_: list[float]
) -> None:
    mine = integer_code(value, bits, *range_, symmetric=symmetric)
    position = value / mine.step + mine.zero
    if abs(position - math.floor(position) - 0.5) < 1e-3:  # a tie is a matter of convention and of float32
        return
    first, last = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    theirs = torch.fake_quantize_per_tensor_affine(torch.tensor([value]), mine.step, mine.zero, first, last).item()
    assert mine.stored == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@given(range_=ranges, share=st.floats(0, 1))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_inside_the_range_the_error_is_at_most_one_step(symmetric: bool, range_: list[float], share: float) -> None:
    low, high = range_
    value = min(max(low + share * (high - low), low), high)
    mine = integer_code(value, 4, low, high, symmetric=symmetric)
    # the integer zero point may shift an asymmetric grid by half a step against its range
    assert mine.absolute_error <= mine.step * (0.5 if symmetric else 1.0) * (1 + 1e-12)


def test_symmetric_int8_uses_codes_minus_127_to_127() -> None:
    assert [integer_code(v, 8, -4, 4).code for v in (-9, -4, 0, 4, 9)] == [-127, -127, 0, 127, 127]


def test_asymmetric_int4_by_hand() -> None:
    # step (2 + 1) / 15 = 0.2, zero round(1 / 0.2) = 5, code round(0.5 / 0.2) + 5 = 8 (2.5 rounds upwards)
    mine = integer_code(0.5, 4, -1, 2, symmetric=False)
    assert (mine.step, mine.zero, mine.code) == (0.2, 5, 8)
    assert mine.stored == pytest.approx(0.6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("range_", [(-1, 2), (2, 4), (-4, -2), (0, 0)])
def test_zero_is_always_stored_exactly(symmetric: bool, range_: tuple[float, float]) -> None:
    assert integer_code(0.0, 4, *range_, symmetric=symmetric).stored == 0


def test_a_value_outside_the_range_is_clipped() -> None:
    mine = integer_code(10, 8, -1, 1)
    assert (mine.clipped, mine.stored, mine.absolute_error) == (True, 1.0, 9.0)
    assert not integer_code(1, 8, -1, 1).clipped


def test_infinity_is_clipped_with_infinite_error() -> None:
    mine = integer_code(-math.inf, 4, -1, 1)
    assert (mine.code, mine.clipped, mine.absolute_error) == (-7, True, math.inf)


def test_bit_strings_of_negative_codes_are_two_s_complement() -> None:
    assert integer_code(-1, 4, -1, 1).bit_string == "1001"


@pytest.mark.parametrize(
    ("value", "bits", "low", "high"),
    [(math.nan, 8, -1, 1), (1, 1, -1, 1), (1, 8, 1, -1), (1, 8, -math.inf, 1), (1, 8, math.nan, 1)],
)
def test_what_has_no_integer_code_is_refused(value: float, bits: int, low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"NaN|bits|range"):
        integer_code(value, bits, low, high)
