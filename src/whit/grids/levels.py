"""Level sets: which multiples of the scale a code stands for.

A level set maps codes 0..n-1 to fixed numbers ("levels") and finds the level nearest to a number that is
already divided by the scale. Scales, groups and offsets are not its business (scaled.py).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

BELOW_HALF = torch.tensor(0.5 - 2**-25)


class Levels(Protocol):
    """A finite, ordered set of numbers."""

    @property
    def bits(self) -> int:
        """Bits per code."""
        ...

    @property
    def low(self) -> float:
        """The smallest level that rounding may choose."""
        ...

    @property
    def high(self) -> float:
        """The largest level that rounding may choose."""
        ...

    @property
    def mirrored(self) -> bool:
        """True when rounding -x always gives minus the level of x."""
        ...

    def nearest(self, x: Tensor) -> Tensor:
        """uint8 codes of the levels nearest to x (float32, any shape)."""
        ...

    def values(self, codes: Tensor) -> Tensor:
        """float32 levels of uint8 codes."""
        ...

    def snap(self, x: Tensor) -> Tensor:
        """float32 levels nearest to x, up to ties; NaN may become any level."""
        ...


@dataclass(frozen=True)
class Integers:
    """Consecutive integers, stored with an offset so that codes are unsigned.

    bits    2..8
    zero    the code of level 0: 2^(bits-1) for signed levels, 0 for unsigned ones
    mirrored  rounding leaves the lowest level out, so that the set is symmetric about zero. Such a file may
              still hold the lowest level when another tool wrote it, and decoding honours it.
    """

    bits: int
    zero: int
    mirrored: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"integer levels take 1 to 8 bits, found {self.bits}")

    @property
    def low(self) -> float:
        """-2^(b-1), one more when mirrored; 0 for unsigned levels."""
        return float(-self.zero + self.mirrored)

    @property
    def high(self) -> float:
        """2^(b-1) - 1, or 2^b - 1 for unsigned levels."""
        return float(2**self.bits - 1 - self.zero)

    def nearest(self, x: Tensor) -> Tensor:
        """Codes of the nearest integers. Ties: away from zero when mirrored, upwards otherwise.

        These are the ties of GGML's reference encoders (Q8_0 rounds halves away from zero, the others add one
        half and truncate), in their order of operations, so that codes agree to the last tie.
        """
        if self.mirrored:
            # truncating after adding the largest float below one half, with x's sign, is exact; with one half itself
            # 0.49999997 would round up, because that sum is already 1
            rounded = torch.copysign(BELOW_HALF, x).add_(x).clamp_(self.low, self.high).to(torch.int8)
            return rounded.view(torch.uint8).add_(self.zero)
        return (x + (self.zero + 0.5)).clamp_(0, 2**self.bits - 1).to(torch.uint8)  # truncation is floor here

    def values(self, codes: Tensor) -> Tensor:
        """Exact small integers in float32."""
        levels = codes.to(torch.float32)
        return levels.sub_(self.zero) if self.zero else levels

    def snap(self, x: Tensor) -> Tensor:
        """Halves go up."""
        return (x + 0.5).floor_().clamp_(self.low, self.high)


@dataclass(frozen=True)
class Table:
    """Arbitrary levels in ascending order, at most 256 of them (IQ4_NL's sixteen, for example).

    `name` stands for the numbers in print; rounding chooses among the first `usable` of them (all when None).
    """

    name: str
    numbers: tuple[float, ...]
    usable: int | None = None

    def __post_init__(self) -> None:
        if list(self.numbers) != sorted(set(self.numbers)) or not 2 <= len(self.numbers) <= 256:
            raise ValueError(f"levels {self.name} must be 2 to 256 different numbers in ascending order")

    def __repr__(self) -> str:
        return f"Table({self.name})"

    @property
    def bits(self) -> int:
        """Bits that an index takes."""
        return (len(self.numbers) - 1).bit_length()

    @property
    def low(self) -> float:
        """The first level."""
        return self.numbers[0]

    @property
    def high(self) -> float:
        """The last level."""
        return self._chosen[-1]

    @property
    def mirrored(self) -> bool:
        """True when the negatives are the same set."""
        return all(a == -b for a, b in zip(self._chosen, reversed(self._chosen), strict=True))

    def nearest(self, x: Tensor) -> Tensor:
        """Index of the nearest level; a tie goes to the lower one."""
        halves, first = self._halves
        if halves is None:
            return torch.bucketize(x, self._middles.to(x.device)).to(torch.uint8)
        index = (x * 2).ceil_().clamp_(first, first + len(halves) - 1).sub_(first).to(torch.int32)
        return halves.to(x.device).index_select(0, index.reshape(-1)).view(x.shape)

    def values(self, codes: Tensor) -> Tensor:
        """The table's numbers as float32."""
        return self._levels.to(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)

    def snap(self, x: Tensor) -> Tensor:
        """A tie goes to the lower one."""
        return self.values(self.nearest(x))

    @cached_property
    def _levels(self) -> Tensor:
        return torch.tensor(self.numbers, dtype=torch.float32)

    @property
    def _chosen(self) -> tuple[float, ...]:
        return self.numbers[: self.usable]

    @cached_property
    def _middles(self) -> Tensor:
        levels = torch.tensor(self._chosen, dtype=torch.float32)
        return (levels[1:] + levels[:-1]) / 2

    @cached_property
    def _halves(self) -> tuple[Tensor | None, int]:
        """Codes by ceil(2 x) from the first entry on, when all boundaries are whole halves; much faster."""
        doubled = 2 * self._middles
        if not torch.equal(doubled, doubled.round()) or doubled[-1] - doubled[0] > 4096:
            return None, 0
        first, last = int(doubled[0]) - 1, int(doubled[-1]) + 1
        return torch.bucketize(torch.arange(first, last + 1) / 2, self._middles).to(torch.uint8), first

    def index(self, number: float) -> int:
        """The code of an exact level. Raises ValueError when it is not one."""
        at = bisect_left(self.numbers, number)
        if at == len(self.numbers) or self.numbers[at] != number:
            raise ValueError(f"{number} is not a level of {self.name}")
        return at
