"""The moments of one block's inputs, gathered while it runs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from whit.calibration.moments import Moments, pooled
from whit.models.taps import Slot


def moments_of(shape: tuple[int, ...], inputs: Inputs, slots: list[Slot]) -> list[Moments | None]:
    """The moments for every matrix of a tensor: one, or one per expert, thin ones backed by the other experts'."""
    found = [inputs.of(slot) for slot in slots]
    if len(shape) == 2:  # parts of one matrix, such as q, k and v, are given the same input
        return found[:1]
    return pooled(found)


TOGETHER = 4  # windows in one product


class Inputs:
    """The moments of one block's inputs; weights that are given the same tensor share them."""

    def __init__(self, prefix: str, kept: int = 0) -> None:
        """kept  tokens of every window to keep as they are"""
        self._prefix, self._kept = prefix, kept
        self._moments: dict[Slot, Moments] = {}
        self._original: dict[Slot, Tensor] = {}
        self._windows = 0
        self._seen: list[tuple[Tensor, Moments]] = []  # of the current window; holding them keeps them apart

    @classmethod
    def known(cls, prefix: str, moments: Mapping[Slot, Moments]) -> Inputs:
        """Of moments that were gathered before, by their names within the block."""
        inputs = cls(prefix)
        inputs._moments = dict(moments)
        return inputs

    @property
    def moments(self) -> Mapping[Slot, Moments]:
        """By names within the block; one object where weights are given the same tensor."""
        return self._moments

    def remember(self, slot: Slot, x: Tensor) -> None:
        """What the original model gives to a weight."""
        self._original[slot] = x

    def see(self, slot: Slot, x: Tensor) -> None:
        """What the quantized prefix gives to it."""
        shared = next((moments for other, moments in self._seen if other is x), None)
        if shared is not None:
            self._moments.setdefault(slot, shared)
            return
        original = self._original.get(slot) if slot[1] is None else None  # experts are given other tokens
        cols = x.shape[-1]
        if slot not in self._moments:
            self._moments[slot] = Moments(cols, original is not None, self._kept)
        moments = self._moments[slot]
        moments.add(x.reshape(-1, cols), None if original is None else original.reshape(-1, cols))
        self._seen.append((x, moments))

    def forget(self) -> None:
        """A window is over."""
        self._seen.clear()
        self._original.clear()
        self._windows += 1
        if self._windows % TOGETHER == 0:
            for moments in self._moments.values():
                moments.settle()

    def of(self, slot: Slot) -> Moments | None:
        """The moments of a weight (full name), None when nothing was multiplied with it."""
        return self._moments.get((slot[0].removeprefix(self._prefix), slot[1]))
