"""The moments of one block's inputs, gathered while it runs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from whit.calibration.moments import Moments, Share, pooled
from whit.models.taps import Slot
from whit.ranks import Ranks


def moments_of(shape: tuple[int, ...], inputs: Inputs, slots: list[Slot]) -> list[Moments | None]:
    """The moments for every matrix of a tensor: one, or one per expert, thin ones backed by the other experts'."""
    if len(shape) == 2:  # parts of one matrix, such as q, k and v, are given the same input
        return [inputs.of(slots[0])]
    return inputs.of_experts(slots)


TOGETHER = 4  # windows in one product
SHARES = 8  # of the windows: what ranks can have of them, and how their sums are added, however many ranks there are
TOKENS, OWN, SHIFT = "tokens", "own", "shift"


def shares_of(n_windows: int, which: range) -> list[range]:
    """Some of the SHARES shares: runs of window numbers. The first always has the first window."""
    return [range(-(-n_windows * k // SHARES), -(-n_windows * (k + 1) // SHARES)) for k in which]


def windows_of(n_windows: int, ranks: Ranks, rank: int) -> range:
    """All windows of a rank."""
    shares = shares_of(n_windows, ranks.part(SHARES, rank))
    return range(shares[0].start, shares[-1].stop) if shares else range(0)


class Inputs:
    """The moments of one block's inputs; weights that are given the same tensor share them.

    With several ranks each has seen some shares of the windows, one after the other; `join` makes the sums, in the
    order of the windows.
    """

    def __init__(self, prefix: str, kept: int = 0, ranks: Ranks | None = None) -> None:
        """For the block whose parameters' names begin with `prefix`.

        kept   tokens of every window to keep as they are
        ranks  who sees windows; None when all are seen here and their sums are made as they come
        """
        self._prefix, self._kept, self._ranks = prefix, kept, ranks
        self._moments: dict[Slot, Moments] = {}
        self._original: dict[Slot, Tensor] = {}
        self._pooled: dict[tuple[Moments | None, ...], list[Moments | None]] = {}  # by identity
        self._windows = 0
        self._seen: list[tuple[Tensor, Moments]] = []  # of the current window; holding them keeps them apart
        # by identity; what waits for the sums of the ranks before this one, which the first has not
        self._shares: dict[Moments, list[Share]] = {}

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
        self._pooled.clear()
        self._original.clear()
        self._windows += 1
        if self._windows % TOGETHER == 0:
            for moments in self._moments.values():
                if self._ranks is None:
                    moments.settle()
                else:
                    moments.multiply()

    def turn(self) -> None:
        """A share of the windows is over."""
        self._windows = 0
        for moments in dict.fromkeys(self._moments.values()):
            share = moments.share()
            if self._ranks is None or self._ranks.rank == 0:
                moments.put(share)
            else:
                self._shares.setdefault(moments, []).append(share)

    def join(self) -> None:
        """Make the sums of what all ranks have seen, on each of them. Raises RankError when one has ended."""
        ranks = self._ranks
        if ranks is None or ranks.size == 1:
            return
        own: dict[Moments, list[Slot]] = {}
        for slot, moments in self._moments.items():
            own.setdefault(moments, []).append(slot)
        if ranks.rank:  # the first goes on with its own
            self._moments = {}
        for by in range(ranks.size):
            mine = list(own) if by == ranks.rank else []
            facts = [
                (own[m], m.cols, m.shifted, m.n_tokens, m.n_lost, len(self._shares[m]) if m in self._shares else 1)
                for m in mine
            ]
            for slots, cols, shifted, n_tokens, n_lost, n_sent in ranks.said(facts, by):
                seen = mine.pop(0) if mine else None
                moments = self._joined([(name, expert) for name, expert in slots], cols, shifted)
                tokens = ranks.given({} if seen is None or seen.tokens is None else {TOKENS: seen.tokens}, by)
                if seen is not moments:
                    moments.counted(n_tokens, n_lost, tokens.get(TOKENS))
                for _ in range(n_sent):
                    sums = {} if seen is None else self._next(seen)
                    found = ranks.given(sums, by)
                    if seen is not moments:
                        moments.put(Share(found.get(OWN), found.get(SHIFT)))

    def _joined(self, slots: list[Slot], cols: int, shifted: bool) -> Moments:
        """The moments that several slots share, found or begun."""
        moments = next((self._moments[slot] for slot in slots if slot in self._moments), None)
        moments = moments or Moments(cols, shifted, self._kept)
        for slot in slots:
            self._moments.setdefault(slot, moments)
        return moments

    def _next(self, moments: Moments) -> dict[str, Tensor]:
        """What this rank has to send of its own: the sums that it made, or else the next share."""
        share = self._shares[moments].pop(0) if moments in self._shares else moments.sums()
        return {name: value for name, value in ((OWN, share.own), (SHIFT, share.shift)) if value is not None}

    def of(self, slot: Slot) -> Moments | None:
        """The moments of a weight (full name), None when nothing was multiplied with it."""
        return self._moments.get((slot[0].removeprefix(self._prefix), slot[1]))

    def of_experts(self, slots: list[Slot]) -> list[Moments | None]:
        """The moments of a layer's experts, thin ones backed by the others'; the same objects where two tensors of the
        layer are given the same, once all windows are over.
        """
        found = tuple(self.of(slot) for slot in slots)
        if found not in self._pooled:
            self._pooled[found] = pooled(found)
        return self._pooled[found]
