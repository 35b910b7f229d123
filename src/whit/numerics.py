"""Number formats, and what becomes of one number in each of them.

The obvious way to see how a number is stored is to cast it and look at the result. That shows what happened,
not why, needs a library for every format, and rounds the error itself. Here a format is a handful of facts
(field widths, bias, which codes are special), rounding is exact rational arithmetic, and the errors are true
to the last digit.

Left out: stochastic rounding, flush-to-zero modes, and formats that share an exponent between numbers (those
are grids).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction


class Kind(Enum):
    """What a stored number is."""

    NORMAL = "normal"
    SUBNORMAL = "subnormal"  # no implicit leading 1: fewer digits the smaller it gets
    ZERO = "zero"
    UNDERFLOW = "underflow"  # not zero, but nearer to zero than to the smallest subnormal
    OVERFLOW = "overflow"  # finite, but beyond the largest number of the format: became infinite
    SATURATED = "saturated"  # beyond the largest number of a format without infinity: became that number
    INFINITE = "infinite"
    NAN = "nan"


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format: sign, exponent and mantissa, in this order from the highest bit.

    name           as torch calls it
    exponent_bits  width of the exponent field
    mantissa_bits  width of the stored mantissa, without the implicit leading 1
    has_infinity   True: the highest exponent is kept for infinities and NaN (IEEE 754). False: that exponent
                   holds ordinary numbers, and only its last mantissa is NaN (the "fn" formats).
    good_for       one sentence
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    has_infinity: bool
    good_for: str

    @property
    def bits(self) -> int:
        """Width of one number."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def min_exponent(self) -> int:
        """Power of two of the smallest normal number."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Power of two of the largest number."""
        return 2**self.exponent_bits - 1 - self.has_infinity - self.bias

    @property
    def largest(self) -> float:
        """The largest finite number."""
        steps = 2 ** (self.mantissa_bits + 1) - (1 if self.has_infinity else 2)
        return math.ldexp(steps, self.max_exponent - self.mantissa_bits)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number that has all its digits."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger number; rounding errs by at most half of it, relatively."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def decimal_digits(self) -> float:
        """Precision in decimal digits: (mantissa bits + 1) * log10(2)."""
        return (self.mantissa_bits + 1) * math.log10(2)


FLOAT_FORMATS: dict[str, FloatFormat] = {
    f.name: f
    for f in (
        FloatFormat("float32", 8, 23, True, "Sums, optimizer states: more digits than weights need."),
        FloatFormat("float16", 5, 10, True, "Weights and block scales: three digits, nothing beyond 65504."),
        FloatFormat("bfloat16", 8, 7, True, "Training, activations: the range of float32 with two digits."),
        FloatFormat("float8_e4m3fn", 4, 3, False, "Weights and activations in 8 bits, with a scale to fit +-448."),
        FloatFormat("float8_e5m2", 5, 2, True, "Gradients in 8 bits: the range of float16 with one digit."),
    )
}


@dataclass(frozen=True)
class Anatomy:
    """One number in one float format.

    value           the number asked for
    sign            "0" or "1"
    exponent        bits of the exponent field, highest first
    mantissa        bits of the mantissa field, highest first
    stored          the number that these bits mean
    absolute_error  |stored - value|, exact before its own last rounding to a Python float; NaN where undefined
    relative_error  absolute_error / |value|; 0 for an exact zero, NaN where undefined
    """

    format: FloatFormat
    value: float
    kind: Kind
    sign: str
    exponent: str
    mantissa: str
    stored: float
    absolute_error: float
    relative_error: float

    @property
    def bits(self) -> str:
        """All bits, highest first."""
        return self.sign + self.exponent + self.mantissa

    @property
    def formula(self) -> str:
        """The stored number as sign, significand and power of two, for reading."""
        sign = "-" if self.sign == "1" else "+"
        if not math.isfinite(self.stored):
            return "not a number" if math.isnan(self.stored) else f"{sign}infinity"
        if self.stored == 0:
            return f"{sign}0"
        power = math.frexp(self.stored)[1] - 1
        return f"{sign}{math.ldexp(abs(self.stored), -power):.10g} x 2^{power}"


def anatomy(value: float, format: FloatFormat) -> Anatomy:
    """Round a number to a float format, to nearest with ties to even, and take the result apart.

    value   any Python float: infinities, NaN, signed zeros and subnormals included
    format  one of FLOAT_FORMATS, or a format of your own of at most 64 bits
    A number too large for the format becomes infinite; where there is no infinity it becomes the largest number
    ("saturated"). The specification allows NaN instead, which torch stored before pytorch/pytorch#178817.
    Source: IEEE 754-2019; for the 8-bit formats arXiv 2209.05433 (OCP FP8).

        anatomy(3.14159, FLOAT_FORMATS["bfloat16"]).stored  # 3.140625
    """
    sign = "1" if math.copysign(1.0, value) < 0 else "0"
    if math.isnan(value):
        # the quiet NaN; all ones where that is the only one
        mantissa = 2 ** (format.mantissa_bits - 1) if format.has_infinity else 2**format.mantissa_bits - 1
        return _assemble(value, format, Kind.NAN, "0", 2**format.exponent_bits - 1, mantissa)
    if math.isinf(value):
        return _beyond(value, format, Kind.INFINITE, sign)
    exact = abs(Fraction(value))
    if exact == 0:
        return _assemble(value, format, Kind.ZERO, sign, 0, 0)

    # Spacing of the format's numbers around the value; below the normal numbers it stays constant.
    power = max(math.frexp(value)[1] - 1, format.min_exponent)
    spacing = Fraction(2) ** (power - format.mantissa_bits)
    steps = round(exact / spacing)  # Python rounds a Fraction's half to even
    if steps == 2 ** (format.mantissa_bits + 1):  # rounding carried into the next power of two
        steps, power, spacing = steps // 2, power + 1, spacing * 2
    if steps * spacing > format.largest:
        return _beyond(value, format, Kind.OVERFLOW, sign)
    implicit = 2**format.mantissa_bits
    if steps < implicit:
        kind = Kind.SUBNORMAL if steps else Kind.UNDERFLOW
        return _assemble(value, format, kind, sign, 0, steps)
    return _assemble(value, format, Kind.NORMAL, sign, power + format.bias, steps - implicit)


def decode(bits: str, format: FloatFormat) -> float:
    """The number that a bit string means.

    bits  `format.bits` characters "0" and "1", highest first
    Raises ValueError for another length or other characters. Source: IEEE 754-2019.
    """
    if len(bits) != format.bits or set(bits) - {"0", "1"}:
        raise ValueError(f"{format.name} takes {format.bits} characters 0 or 1, found {bits!r}")
    sign = -1.0 if bits[0] == "1" else 1.0
    exponent = int(bits[1 : 1 + format.exponent_bits], 2)
    mantissa = int(bits[1 + format.exponent_bits :], 2)
    top = exponent == 2**format.exponent_bits - 1
    if top and format.has_infinity:
        return math.nan if mantissa else sign * math.inf
    if top and mantissa == 2**format.mantissa_bits - 1:
        return math.nan
    steps = mantissa + (2**format.mantissa_bits if exponent else 0)
    return sign * math.ldexp(steps, max(exponent, 1) - format.bias - format.mantissa_bits)


def _beyond(value: float, format: FloatFormat, kind: Kind, sign: str) -> Anatomy:
    """A number above the largest one: infinity, or saturated where there is none."""
    top = 2**format.exponent_bits - 1
    if format.has_infinity:
        return _assemble(value, format, kind, sign, top, 0)
    return _assemble(value, format, Kind.SATURATED, sign, top, 2**format.mantissa_bits - 2)


def _assemble(value: float, format: FloatFormat, kind: Kind, sign: str, exponent: int, mantissa: int) -> Anatomy:
    fields = f"{exponent:0{format.exponent_bits}b}", f"{mantissa:0{format.mantissa_bits}b}"
    stored = decode(sign + "".join(fields), format)
    return Anatomy(format, value, kind, sign, *fields, stored, *_errors(value, stored))


def _errors(value: float, stored: float | Fraction) -> tuple[float, float]:
    """Absolute and relative error."""
    if math.isnan(stored) or math.isnan(value):
        return math.nan, math.nan
    if math.isinf(stored) or math.isinf(value):
        return (0.0, 0.0) if stored == value else (math.inf, math.inf)
    difference = abs(Fraction(stored) - Fraction(value))
    if difference == 0:
        return 0.0, 0.0
    return _float(difference), _float(difference / abs(Fraction(value))) if value else math.inf


def _float(number: Fraction) -> float:
    """The nearest Python float; infinity beyond its range, where float() would raise."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


@dataclass(frozen=True)
class IntegerCode:
    """One number on a uniform integer grid: stored = step * (code - zero).

    value           the number asked for
    bits            bits per code
    symmetric       True: codes -(2^(b-1)-1) .. 2^(b-1)-1 and zero = 0; False: codes 0 .. 2^b-1
    low, high       the range that the codes were laid over, after it was widened to fit the kind of grid
    step            distance between neighbouring values
    zero            the code that means 0
    code            the integer that is stored
    stored          the number that the code means
    absolute_error  |stored - value|
    relative_error  absolute_error / |value|; 0 for an exact zero
    clipped         True when the value lies outside the codes' reach, by more than half a step
    """

    value: float
    bits: int
    symmetric: bool
    low: float
    high: float
    step: float
    zero: int
    code: int
    stored: float
    absolute_error: float
    relative_error: float
    clipped: bool

    @property
    def bit_string(self) -> str:
        """The code's bits, two's complement for symmetric grids."""
        return f"{self.code % 2**self.bits:0{self.bits}b}"


def integer_code(value: float, bits: int, low: float, high: float, *, symmetric: bool = True) -> IntegerCode:
    """The integer code of a number, for weights that span a given range.

    value      finite or infinite (an infinity is clipped)
    bits       2 .. 16
    low, high  the range of the weights, finite, low <= high
    symmetric  the range is widened to [-m, m], m = max(|low|, |high|), and step = m / (2^(b-1) - 1); otherwise
               it is widened to contain 0, step = (high - low) / (2^b - 1) and zero = round(-low / step)
    Halves round away from zero when symmetric and upwards otherwise, as Whit's integer grids do. Step and
    stored value are exact before their last rounding to a Python float; an all-zero range has step 1.
    Raises ValueError for NaN, for a range that is empty or not finite, and for other bit widths.
    Source: arXiv 1712.05877 (Jacob et al.), eq. 1, with the zero point in code units.

        integer_code(3.14159, 8, -4, 4).code  # 100
    """
    if math.isnan(value):
        raise ValueError("NaN has no integer code")
    if not 2 <= bits <= 16:
        raise ValueError(f"integer codes take 2 to 16 bits, found {bits}")
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"the range must be finite and in ascending order, found {low} to {high}")
    if symmetric:
        most = max(abs(low), abs(high))
        low, high, first, last = -most, most, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
        step = Fraction(most) / last or Fraction(1)
        zero = 0
    else:
        low, high, first, last = min(low, 0.0), max(high, 0.0), 0, 2**bits - 1
        step = (Fraction(high) - Fraction(low)) / last or Fraction(1)
        zero = math.floor(-Fraction(low) / step + Fraction(1, 2))

    if math.isinf(value):
        code, clipped = (last if value > 0 else first), True
    else:
        exact = Fraction(value)
        nearest = _round_half_away(exact / step) if symmetric else math.floor(exact / step + zero + Fraction(1, 2))
        code = min(max(nearest, first), last)
        # within half a step beyond the last code the error is no larger than inside the range
        clipped = code != nearest and abs(step * (code - zero) - exact) > step / 2
    stored = step * (code - zero)
    absolute, relative = _errors(value, stored)
    return IntegerCode(
        value,
        bits,
        symmetric,
        low,
        high,
        _float(step),
        zero,
        code,
        _float(stored),
        absolute,
        relative,
        clipped,
    )


def _round_half_away(number: Fraction) -> int:
    whole = math.floor(abs(number) + Fraction(1, 2))
    return whole if number >= 0 else -whole
