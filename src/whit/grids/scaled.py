"""Grids with one level of scales: value = scale * level, plus a zero point or a minimum if there is one.

One description covers GGML's legacy types (groups of 32, half-precision scale), the integer grids of
GPTQ, AWQ and compressed-tensors, and per-channel int8. Two-level scales (K-quants) are grids of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from whit.grids.grid import Params, Spec
from whit.grids.levels import Integers, Levels
from whit.grids.search import search_minimum, search_scale, search_zero_point


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole matrix."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per row, that is per output channel."""


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive weights of a row."""

    size: int


POWER_OF_TWO = torch.float8_e8m0fnu
Scheme = PerTensor | PerChannel | PerGroup


class Offset(Enum):
    """What shifts the levels of a group."""

    NONE = "none"  # value = scale * level
    ZERO_POINT = "zero point"  # value = scale * (level - integer zero point)
    MINIMUM = "minimum"  # value = scale * level + float minimum


@dataclass(frozen=True)
class Scaled:
    """value = scale * level, scale * (level - zero point) or scale * level + minimum.

    levels       the level set
    scheme       which weights share a scale
    offset       what is stored besides the scale
    scale_dtype  dtype in which the file stores the scale (and the minimum)
    code_bits    bits of a stored code where that is no whole number
    unit         what a stored scale of 1 stands for
    """

    levels: Levels
    scheme: Scheme
    offset: Offset = Offset.NONE
    scale_dtype: torch.dtype = torch.float16
    code_bits: float | None = None
    unit: float = 1.0

    def __post_init__(self) -> None:
        if self.unit != 1 and self.offset is Offset.MINIMUM:
            raise ValueError("a minimum is stored as it is, so that scales have to be, too")
        if self.offset is not Offset.NONE and not (isinstance(self.levels, Integers) and self.levels.zero == 0):
            raise ValueError(f"a {self.offset.value} needs unsigned integer levels, found {self.levels}")

    @property
    def step(self) -> int:
        """One code per weight."""
        return 1

    @property
    def row_independent(self) -> bool:
        """False only when one scale serves the whole matrix."""
        return not isinstance(self.scheme, PerTensor)

    def spans(self, cols: int) -> tuple[int, ...]:
        """The group width, or the whole row."""
        return (self.scheme.size,) if isinstance(self.scheme, PerGroup) else (cols,)

    def bits_per_weight(self, cols: int) -> float:
        """Code bits plus this row's share of scales and offsets; a per-tensor scale counts as nothing."""
        if isinstance(self.scheme, PerTensor):
            return float(self.levels.bits)
        code_bits = self.levels.bits if self.code_bits is None else self.code_bits
        scale_bits = torch.finfo(self.scale_dtype).bits
        offset_bits = {Offset.NONE: 0, Offset.MINIMUM: scale_bits, Offset.ZERO_POINT: self.levels.bits}[self.offset]
        return code_bits + (scale_bits + offset_bits) / self.spans(cols)[0]

    def code_spec(self, shape: tuple[int, int]) -> Spec:
        """uint8, one code per weight."""
        return Spec(shape, torch.uint8)

    def schema(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """`scale` [rows, groups] and, by offset, `zero` (uint8) or `minimum` of the same shape."""
        rows, cols = shape
        per_row = cols // self.spans(cols)[0]
        if per_row * self.spans(cols)[0] != cols:
            raise ValueError(group_size_error(cols, self.spans(cols)[0]))
        blocks = (1, 1) if isinstance(self.scheme, PerTensor) else (rows, per_row)
        schema = {"scale": Spec(blocks, self.scale_dtype)}
        if self.offset is Offset.ZERO_POINT:
            schema["zero"] = Spec(blocks, torch.uint8)
        elif self.offset is Offset.MINIMUM:
            schema["minimum"] = Spec(blocks, self.scale_dtype)
        return schema

    def fit(self, W: Tensor) -> Params:
        """The widest range of each group laid onto the whole level set, in float32.

        Without an offset the weight of largest magnitude lands on the level of largest magnitude, sign included,
        so that an asymmetric level set is used to its longer end.
        Source: the reference encoders of GGML (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0); OCP Microscaling Formats 1.0, 6.3.
        """
        x = self._blocks(W)  # [n_rows, n_groups, size]
        if self.unit != 1:
            x = x / self.unit
        if self.offset is Offset.NONE:
            largest = self._largest(x)
            if self.scale_dtype is POWER_OF_TWO:  # the exponents of both, whatever the fractions: the MX rule
                exponent = _exponent(largest) - _exponent(torch.tensor(float(self.levels.high)))
                return {"scale": torch.ldexp(torch.ones_like(largest), exponent)}
            return {"scale": largest / self._anchor}
        low, high = _range(x)
        if self.offset is Offset.MINIMUM:
            return {"scale": (high - low) / self.levels.high, "minimum": low}
        low, high = low.clamp(max=0), high.clamp(min=0)  # zero must be representable
        scale = (high - low) / self.levels.high
        return {"scale": scale, "zero": (-low * _inverse(scale)).round_()}

    def search(self, W: Tensor, weights: Tensor | None) -> Params:
        """Stored parameters of least weighted squared error among candidates around `fit` (search.py).

        Never worse than nearest rounding with the parameters of `fit`, in every group. Without weights
        all errors weigh the same.
        """
        weights = torch.ones_like(W) if weights is None else weights
        x, importance = self._blocks(W), self._blocks(weights.expand_as(W))
        start, plain = self.fit(W), self
        if self.unit != 1:
            x, plain = x / self.unit, replace(self, unit=1.0)
        if self.offset is Offset.NONE:
            return search_scale(x, importance, start, plain)
        if self.offset is Offset.MINIMUM:
            return search_minimum(x, importance, start, plain)
        return search_zero_point(x, importance, start, plain)

    def store(self, params: Params) -> Params:
        """Scales and minima rounded to `scale_dtype`, zero points to uint8. Raises OverflowError."""
        stored = {}
        for name, value in params.items():
            stored[name] = value.to(torch.uint8 if name == "zero" else self.scale_dtype)
            if name != "zero" and not self._holds(value, stored[name]):
                raise OverflowError(
                    f"a {name} of {value.abs().max():.3g} does not fit {str(self.scale_dtype).removeprefix('torch.')}"
                )
        return stored

    def round(self, W: Tensor, params: Params, weights: Tensor | None = None) -> Tensor:
        """uint8 codes [rows, cols] nearest to W; `params` may be unrounded (`fit`) or stored."""
        return self.round_blocks(self._blocks(W), params).view(W.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """[rows, cols] float32."""
        return self.decode_blocks(self._blocks(codes), params).view(codes.shape)

    def effective(self, params: Params) -> tuple[Tensor, Tensor | None]:
        """Scale and offset [rows, groups] float32."""
        scale = self._scale(params)
        if self.offset is Offset.ZERO_POINT:
            return scale, -scale * params["zero"].float()
        return scale, params["minimum"].float() if self.offset is Offset.MINIMUM else None

    def late(self, W: Tensor, weights: Tensor, params: Params, inner: int) -> Params:
        """The same parameters: with one level of scales nothing is left to choose."""
        return params

    def bases(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """The levels for the scale (less the zero point), ones for the minimum."""
        levels = self.levels.values(codes)
        if self.unit != 1:
            levels = levels * self.unit
        if self.offset is Offset.ZERO_POINT:
            blocks = self._blocks(levels) - params["zero"].float()[..., None] * self.unit
            return {"scale": blocks.view(codes.shape)}
        if self.offset is Offset.MINIMUM:
            return {"scale": levels, "minimum": torch.ones_like(levels)}
        return {"scale": levels}

    def round_blocks(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """As `round`, on weights [n_rows, n_groups, size] and parameters [n_rows, n_groups]."""
        inverse = _inverse(self._scale(params))[..., None]
        if self.offset is Offset.MINIMUM:
            return self.levels.nearest((x - params["minimum"].float()[..., None]).mul_(inverse))
        x = x * inverse
        if self.offset is Offset.ZERO_POINT:
            x += params["zero"].float()[..., None]
        return self.levels.nearest(x)

    def decode_blocks(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """As `decode`, on codes [n_rows, n_groups, size] and parameters [n_rows, n_groups]."""
        values = self.levels.values(codes)
        if self.offset is Offset.ZERO_POINT:
            values -= params["zero"].float()[..., None]
        values *= self._scale(params)[..., None]
        if self.offset is Offset.MINIMUM:
            values += params["minimum"].float()[..., None]
        return values

    def _scale(self, params: Mapping[str, Tensor]) -> Tensor:
        scale = params["scale"].float()
        return scale if self.unit == 1 else scale * self.unit

    def _holds(self, value: Tensor, stored: Tensor) -> bool:
        """Whether nothing overflowed. Types of 8 bits do not say so: they take the largest number that they have."""
        largest = torch.finfo(stored.dtype)
        if largest.bits == 8:
            return bool((value.abs() <= largest.max).all())
        return bool(torch.isfinite(stored).all())

    @property
    def _anchor(self) -> float:
        """The level of largest magnitude, the negative one when both ends are as long and not mirrored."""
        return self.levels.low if abs(self.levels.low) > self.levels.high else self.levels.high

    def _largest(self, x: Tensor) -> Tensor:
        """Per group the weight of largest magnitude; its magnitude alone when the level set is mirrored."""
        low, high = _range(x)
        if self.levels.mirrored:
            return torch.maximum(high, low.abs())
        largest = torch.where(high > -low, high, low)
        tied = (high == -low) & (high > 0)
        if tied.any():  # the reference encoders take whichever comes first in the group
            among = x[tied]  # [n_tied, size]
            first = (among.abs() == high[tied][:, None]).int().argmax(dim=-1, keepdim=True)
            largest[tied] = among.gather(-1, first)[:, 0]
        return largest

    def _blocks(self, matrix: Tensor) -> Tensor:
        rows, cols = matrix.shape
        if isinstance(self.scheme, PerTensor):
            return matrix.reshape(1, 1, rows * cols)
        self.schema((rows, cols))  # divisibility
        return matrix.reshape(rows, -1, self.spans(cols)[0])


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each group; two reductions are six times faster than `aminmax` over short groups."""
    return x.amin(-1).add_(0.0), x.amax(-1).add_(0.0)  # no negative zeros: which of two zeros is found is chance


def _exponent(value: Tensor) -> Tensor:
    """floor(log2(value)) + 1, for positive values."""
    return torch.frexp(value).exponent


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not finite: a group of zeros, or one too small for float32's inverse."""
    inverse = scale.reciprocal()
    return inverse.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def integer_grid(bits: int, scheme: Scheme, symmetric: bool, scale_dtype: torch.dtype = torch.float16) -> Scaled:
    """The integer grids of 2 to 8 bits.

    Symmetric: signed levels without an offset; at 8 bits mirrored (-127..127), because one level in 256 is not
    worth an asymmetric range. Asymmetric: unsigned levels with an integer zero point.
    Raises ValueError for other bit widths.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"integer grids have 2 to 8 bits, found {bits}")
    if symmetric:
        return Scaled(Integers(bits, 2 ** (bits - 1), mirrored=bits == 8), scheme, Offset.NONE, scale_dtype)
    return Scaled(Integers(bits, 0), scheme, Offset.ZERO_POINT, scale_dtype)


def group_size_error(cols: int, size: int) -> str:
    """One sentence for rows that do not divide into groups, with the sizes that would."""
    fitting = [n for n in (16, 32, 64, 128, 256) if cols % n == 0]
    hint = f"groups of {', '.join(map(str, fitting))} fit" if fitting else "no usual group size fits"
    return f"rows of {cols} weights do not divide into groups of {size}; {hint}"
