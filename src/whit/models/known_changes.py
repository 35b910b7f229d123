"""How one tensor on disk becomes the same tensor in a GGUF file, and back.

llama.cpp and transformers compute the same functions from weights in another order, offset or scale. Each such
difference is a value here that knows both directions, so that one table describes reading and writing. All but
`PlusOne` only move or scale by powers of two and are exact at every float type; `PlusOne` rounds in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Dims = Mapping[str, int]
Shape = tuple[int, ...]
Sibling = Callable[[str], Tensor]


class Change(Protocol):
    """A reversible difference between a tensor on disk and in GGUF.

    `dims` are the model's sizes by name; `sibling` reads another tensor of the same block on the side that is
    read, by the template of its name.
    """

    def disk_shape(self, shape: Shape, dims: Dims) -> Shape:
        """The shape on disk of a tensor that has `shape` in GGUF."""
        ...

    def to_gguf(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """From disk to GGUF."""
        ...

    def to_disk(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """From GGUF to disk."""
        ...


@dataclass(frozen=True)
class Same:
    """No difference."""

    def disk_shape(self, shape: Shape, dims: Dims) -> Shape:
        """Unchanged."""
        return shape

    def to_gguf(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """Unchanged."""
        return W

    def to_disk(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """Unchanged."""
        return W


@dataclass(frozen=True)
class RotaryRows:
    """Rows of a head in pairs that rotate together: GGUF has each pair adjacent, disk has halves of the head.

    heads  name of the number of heads in the sizes
    """

    heads: str

    def disk_shape(self, shape: Shape, dims: Dims) -> Shape:
        """Unchanged."""
        return shape

    def to_gguf(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """Interleave the halves of every head; works on weights [rows, cols] and biases [rows]."""
        halves = W.reshape(dims[self.heads], 2, -1, *W.shape[1:])  # [heads, 2, head_dim / 2, ...]
        return halves.transpose(1, 2).reshape(W.shape)

    def to_disk(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """Gather even and odd rows of every head into halves."""
        pairs = W.reshape(dims[self.heads], -1, 2, *W.shape[1:])  # [heads, head_dim / 2, 2, ...]
        return pairs.transpose(1, 2).reshape(W.shape)


@dataclass(frozen=True)
class PlusOne:
    """Gemma's norms multiply by 1 + w; GGUF holds 1 + w in float32."""

    def disk_shape(self, shape: Shape, dims: Dims) -> Shape:
        """Unchanged."""
        return shape

    def to_gguf(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """float32: bfloat16 has too few bits for the sum."""
        return W.float() + 1

    def to_disk(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """float32; exact for weights that were bfloat16 or float16 and not tiny."""
        return W.float() - 1


@dataclass(frozen=True)
class Transposed:
    """GPT-2's Conv1D stores [in, out]."""

    def disk_shape(self, shape: Shape, dims: Dims) -> Shape:
        """Reversed."""
        return shape[::-1]

    def to_gguf(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """[in, out] -> [out, in]."""
        return W.t()

    def to_disk(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """[out, in] -> [in, out]."""
        return W.t()


@dataclass(frozen=True)
class QKVByHead:
    """GPT-NeoX fuses q, k and v head by head; GGUF wants all of q, then k, then v."""

    def disk_shape(self, shape: Shape, dims: Dims) -> Shape:
        """Unchanged."""
        return shape

    def to_gguf(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """Rows in the order (head, qkv, channel) -> (qkv, head, channel)."""
        by_head = W.reshape(dims["heads"], 3, -1, *W.shape[1:])  # [heads, 3, head_dim, ...]
        return by_head.transpose(0, 1).reshape(W.shape)

    def to_disk(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """Rows in the order (qkv, head, channel) -> (head, qkv, channel)."""
        by_kind = W.reshape(3, dims["heads"], -1, *W.shape[1:])  # [3, heads, head_dim, ...]
        return by_kind.transpose(0, 1).reshape(W.shape)


@dataclass(frozen=True)
class SkipRows:
    """The first rows on disk are never used (OPT's positions begin at 2); they come back as zeros."""

    n: int

    def disk_shape(self, shape: Shape, dims: Dims) -> Shape:
        """`n` rows more."""
        return (shape[0] + self.n, *shape[1:])

    def to_gguf(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """Without the first `n` rows."""
        return W[self.n :]

    def to_disk(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """With `n` rows of zeros in front."""
        return torch.cat([W.new_zeros(self.n, *W.shape[1:]), W])


@dataclass(frozen=True)
class Woven:
    """GPT-OSS keeps all experts in one tensor, on their sides, and rows of several matrices in turn.

        disk [experts, cols, n * rows], bias [experts, n * rows]     GGUF n times [experts, rows, cols], [experts, rows]

    part     which of the matrices this one is
    siblings templates in GGUF of all of them, in their order on disk
    """

    part: int
    siblings: tuple[str, ...]

    def disk_shape(self, shape: Shape, dims: Dims) -> Shape:
        """All rows last."""
        experts, rows, *cols = shape
        return (experts, *cols, rows * len(self.siblings))

    def to_gguf(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """Its own rows, of any number of experts."""
        own = W[..., self.part :: len(self.siblings)]
        return own.transpose(1, 2) if W.ndim == 3 else own

    def to_disk(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """Woven with its siblings."""
        parts = [W if n == self.part else sibling(name).to(W.dtype) for n, name in enumerate(self.siblings)]
        woven = torch.stack(parts, dim=2).flatten(1, 2)  # [experts, rows * n, ...]
        return woven.transpose(1, 2) if W.ndim == 3 else woven


RELU_SCALE = 4096.0
HALF_OF_FLOAT16 = 32768.0


def relu_scale(W: Tensor) -> float:
    """The power of two k for which gelu(k x) / k stands for relu(x), given the layer's weights W [rows, cols].

    4096 makes the difference at most 4.2e-5 of one unit of the activation; less when k W would not fit in float16.
    """
    largest = float(W.abs().max())
    if not math.isfinite(largest) or largest * RELU_SCALE <= HALF_OF_FLOAT16:
        return RELU_SCALE
    return 2.0 ** math.floor(math.log2(HALF_OF_FLOAT16 / largest))


@dataclass(frozen=True)
class ReluScaled:
    """The input side of a ReLU, multiplied by k: relu(x) = relu(k x) / k, and far from zero relu is gelu.

    weight  template on disk of the matrix that decides k
    scales  template in GGUF of the vector that holds k and by which llama.cpp divides the activation
    """

    weight: str
    scales: str

    def disk_shape(self, shape: Shape, dims: Dims) -> Shape:
        """Unchanged."""
        return shape

    def to_gguf(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """k W, in the stored type for a matrix; a bias becomes float32, for float16 might overflow."""
        k = relu_scale(sibling(self.weight) if W.ndim == 1 else W)
        return (W.float() if W.ndim == 1 else W) * k

    def to_disk(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """W / k."""
        return W / float(sibling(self.scales)[0])


@dataclass(frozen=True)
class ReluScales:
    """The vector of k that `ReluScaled` needs, made from the matrix; it has no counterpart on disk."""

    def disk_shape(self, shape: Shape, dims: Dims) -> Shape:
        """The matrix that decides k."""
        return (*shape, dims["hidden"])

    def to_gguf(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """k for every row of W, float32."""
        return torch.full((W.shape[0],), relu_scale(W))

    def to_disk(self, W: Tensor, dims: Dims, sibling: Sibling) -> Tensor:
        """Never asked for."""
        raise ValueError("k is no tensor of its own on disk")
