"""A file's tensors as if no columns had been rescaled before rounding.

Calibrated rounding may multiply the columns of a matrix and divide what makes its inputs by the same numbers
(transforms/absorb.py). The file does not say so, and its tensors beside the original's then look wrong although the
model is the same. Here the factors are read off the tensors: every member of a pair gives its own estimate, and what
most of them agree on, no rescaling in the first place, is taken for true. A member that is not what it should be is
outvoted, and shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from whit.models.architecture import GGUFView
from whit.transforms.absorb import Pair, block_pairs, head_pair

LEAST = 1e-3  # factors lie between this and its inverse
CLEAR = 0.5  # another factor than 1 is believed when it leaves less than this share of the disagreement
Tensors = Mapping[str, Tensor]


class Frame:
    """Factors per tensor, found so far.

    rows, columns  what rows have been divided by and columns multiplied with, by tensor name
    """

    def __init__(self, view: GGUFView) -> None:
        """view  of the original; headers alone are used"""
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self._shapes = {tensor.name: tensor.shape for tensor in view.tensors}
        self._kv_heads = view.metadata.get(f"{view.architecture}.attention.head_count_kv", 0)

    def find(self, names: Sequence[str], prefix: str, written: Tensors, original: Tensors) -> None:
        """Find the factors of the pairs among `names`, the tensors of one block (or, without prefix, of none)."""
        shapes = {name: self._shapes[name] for name in names}
        heads = self._kv_heads if isinstance(self._kv_heads, int) else self._kv_heads[int(prefix.split(".")[1])]
        head = None if prefix else head_pair(shapes)
        for pair in block_pairs(shapes, prefix, heads) if prefix else [head] if head else []:
            t = self._factors(pair, written, original)
            if t is not None:
                for name in pair.producers:
                    self.rows[name] = t
                for name in pair.consumers:
                    self.columns[name] = t[pair.channel]

    def undo(self, name: str, Q: Tensor) -> Tensor:
        """A tensor of the file with its factors taken back; experts and all else as they are."""
        if name in self.columns:
            Q = Q / self.columns[name]
        if name in self.rows:
            Q = Q * self.rows[name].view(-1, *[1] * (Q.dim() - 1))
        return Q

    def _factors(self, pair: Pair, written: Tensors, original: Tensors) -> Tensor | None:
        """[channels], None for no rescaling."""
        found = [self._of_rows(name, written, original) for name in pair.producers if not name.endswith(".bias")]
        found += [self._of_columns(name, pair.channel, written, original) for name in pair.consumers]
        if not found:
            return None
        logs = torch.stack([each.log() for each in found])  # [members, channels]
        none = _disagreement(logs, torch.zeros_like(logs[0]))
        for each in (logs[0], min(logs, key=lambda each: _disagreement(logs, each))):  # the norm's is exact
            if _disagreement(logs, each) < CLEAR * none:
                return each.exp()
        return None

    def _of_rows(self, name: str, written: Tensors, original: Tensors) -> Tensor:
        Q, W = self.undo(name, written[name]), original[name]
        return _bounded(_sums(W * W), _sums(Q * W))

    def _of_columns(self, name: str, channel: Tensor, written: Tensors, original: Tensors) -> Tensor:
        Q, W = written[name], original[name]
        product, square = torch.zeros(int(channel.max()) + 1), torch.zeros(int(channel.max()) + 1)
        product.index_add_(0, channel, (Q * W).sum(0))
        square.index_add_(0, channel, W.square().sum(0))
        return _bounded(product, square)


def by_block(names: Sequence[str]) -> Mapping[str, list[str]]:
    """Tensors by the block they are in, as `blk.3.`; the rest under an empty name."""
    found: dict[str, list[str]] = {}
    for name in names:
        prefix = ".".join(name.split(".")[:2]) + "." if name.startswith("blk.") else ""
        found.setdefault(prefix, []).append(name)
    return found


def _sums(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _bounded(above: Tensor, below: Tensor) -> Tensor:
    t = (above / below).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)  # a channel of zeros says nothing
    return t.clamp(LEAST, 1 / LEAST)


def _disagreement(logs: Tensor, with_: Tensor) -> float:
    return (logs - with_).abs().median(dim=1).values.clamp(max=1).sum().item()
