"""A GGUF file's tensors under the names that transformers gives them on disk, as the tables in known.py say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from whit.checkpoints.source import TensorInfo
from whit.errors import BadWeightsError, BrokenFileError, ModelError
from whit.models.known_changes import Dims, Shape, Sibling
from whit.models.known_table import Architecture, Stored, Weight


@dataclass(frozen=True)
class Origin:
    """Where a tensor on disk is found in a GGUF file: rows (or experts) `start` to `start + n` of `gguf`.

    weight  its line in the table
    block   the block that it belongs to
    shape   its shape on disk
    """

    weight: Weight
    gguf: str
    block: int
    start: int
    n: int
    shape: Shape


class FromGGUF:
    """GGUF tensors under the names that transformers gives them on disk."""

    def __init__(self, table: Architecture, stored: Stored, weights: Sequence[Weight], dims: Dims) -> None:
        self._source, self._dims, self.module_names = stored.tensors, dims, table.module_names
        self._origins: dict[str, list[Origin]] = {}  # woven ones are found in several tensors
        self._last: tuple[str, Tensor] | None = None  # a stack of experts is decoded once, not once per expert
        there, used, missing = set(stored.tensors.names()), set[str](), list[str]()
        for weight, block in (pair for stage in stages(weights, dims["layers"]) for pair in stage):
            name = weight.gguf.format(i=block)
            used.add(name)
            if name not in there:
                missing.append(name)
                continue
            check_shape(name, self._source.info(name).shape, weight.gguf_shape(dims), "the metadata")
            if not weight.derived:
                for disk, origin in self._pieces(weight, name, block):
                    self._origins.setdefault(disk, []).append(origin)
        if missing:
            raise BrokenFileError(f"{some_of(missing)} missing from the GGUF file.")
        extra = sorted(there - used - {name for trait in table.traits for name in trait.names})
        if extra:
            raise ModelError(f"{some_of(extra)} in the GGUF file, but not part of {table.model_type}.")

    def names(self) -> Sequence[str]:
        """Names on disk, in the order of the GGUF file."""
        return list(self._origins)

    def origin(self, name: str) -> Origin:
        """Where the (first rows of the) tensor that is called `name` on disk are found. Raises KeyError."""
        return self._origins[name][0]

    def origins(self, name: str) -> Sequence[Origin]:
        """As `origin`, all of them: several where its rows are those of several GGUF tensors in turn."""
        return self._origins[name]

    def info(self, name: str) -> TensorInfo:
        """Shape on disk; type and share of the bytes of the GGUF tensor."""
        origins = self._origins[name]
        infos = [self._source.info(each.gguf) for each in origins]
        n_bytes, n_weights = sum(each.n_bytes for each in infos), sum(math.prod(each.shape) for each in infos)
        share = min(1.0, math.prod(origins[0].shape) / n_weights)
        return TensorInfo(name, origins[0].shape, infos[0].dtype, round(n_bytes * share))

    def read(self, name: str) -> Tensor:
        """The values as they are on disk."""
        origin = self.origin(name)
        W = self._stack(origin)[origin.start : origin.start + origin.n]
        W = W[0] if origin.weight.of_experts else W
        W = origin.weight.change.to_disk(W, self._dims, self._sibling(origin.block))
        W = W.contiguous()
        shared = origin.weight.of_experts or W.untyped_storage().nbytes() > W.numel() * W.element_size()
        return W.clone() if shared else W  # never a view into a larger tensor

    def _pieces(self, weight: Weight, name: str, block: int) -> Iterable[tuple[str, Origin]]:
        shapes = weight.piece_shapes(self._dims)
        if weight.of_experts:
            shape = weight.change.disk_shape(shapes[0], self._dims)
            for expert in range(self._dims["experts"]):
                yield weight.disk[0].format(i=block, e=expert), Origin(weight, name, block, expert, 1, shape)
            return
        start = 0
        for disk, rows in zip(weight.disk, shapes, strict=True):
            shape = weight.change.disk_shape(rows, self._dims)
            yield disk.format(i=block), Origin(weight, name, block, start, rows[0], shape)
            start += rows[0]

    def forget(self) -> None:
        """Read again what may have been kept: the source has changed."""
        self._last = None

    def _stack(self, origin: Origin) -> Tensor:
        if not origin.weight.of_experts:
            return self._source.read(origin.gguf)
        if self._last is None or self._last[0] != origin.gguf:
            self._last = None  # let the old one go before the new one comes
            self._last = origin.gguf, self._source.read(origin.gguf)
        return self._last[1]

    def _sibling(self, block: int) -> Sibling:
        return lambda template: self._source.read(template.format(i=block))


def stages(weights: Sequence[Weight], n_blocks: int) -> list[list[tuple[Weight, int]]]:
    """Before the blocks, every block, after the blocks: pairs of a weight and its block."""
    first = next(n for n, weight in enumerate(weights) if weight.per_block)
    blocks = [[(weight, i) for weight in weights if weight.per_block] for i in range(n_blocks)]
    outside = [(weight, 0) for weight in weights if not weight.per_block]
    return [outside[:first], *blocks, outside[first:]]


def check_shape(name: str, found: Shape, expected: Shape, by: str) -> None:
    """Raise BadWeightsError unless they are the same. by: what says what is expected."""
    if tuple(found) != tuple(expected):
        raise BadWeightsError(f"{name} has shape {list(found)}, but {by} makes it {list(expected)}.")


def some_of(names: Sequence[str]) -> str:
    """The first few of them and how many more, with the verb that follows."""
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{listed} {'is' if len(names) == 1 else 'are'}"
