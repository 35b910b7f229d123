"""GGML blocks: quantized tensors as the bytes that llama.cpp's runtime reads, and back.

A row is cut into blocks of 32 weights and each block is a record of fields. A type is the list of its
fields in storage order; sizes follow from the list. Everything is little-endian.
Source: the GGML block formats as listed in docs/formats.md; checked bit for bit against the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.floats import Float
from whit.grids.grid import Grid
from whit.grids.named import GRIDS
from whit.grids.quantized import QuantizedTensor

BLOCK = 32


@dataclass(frozen=True)
class Field:
    """One field of a block, on whole arrays of blocks.

    name     "codes" for (part of) the codes, else the parameter's name
    n_bytes  bytes per block
    pack     [n, 32] uint8 codes or [n] parameter -> [n, n_bytes] uint8
    unpack   the inverse; partial codes are added together
    """

    name: str
    n_bytes: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


def _half(name: str) -> Field:
    return Field(
        name,
        2,
        lambda values: values.contiguous().view(torch.uint8).view(-1, 2),
        lambda raw: raw.clone(memory_format=torch.contiguous_format).view(torch.float16).view(-1),
    )


def _pack_nibbles(codes: Tensor) -> Tensor:
    low = codes & 15
    return low[:, :16] | (low[:, 16:] << 4)


def _unpack_nibbles(raw: Tensor) -> Tensor:
    return torch.cat((raw & 15, raw >> 4), dim=1)


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    bits = (codes >> 4).view(-1, 4, 8)  # bit j of byte k belongs to element 8 k + j
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def _unpack_fifth_bits(raw: Tensor) -> Tensor:
    bits = (raw[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [n, 4, 8]
    return (bits << 4).view(-1, BLOCK)


# The byte of element j holds element j in its low and element j + 16 in its high nibble.
NIBBLES = Field("codes", 16, _pack_nibbles, _unpack_nibbles)
FIFTH_BITS = Field("codes", 4, _pack_fifth_bits, _unpack_fifth_bits)
# int8 in the file, level + 128 as a code: the top bit differs, nothing else.
SIGNED_BYTES = Field("codes", 32, lambda codes: codes ^ 128, lambda raw: raw ^ 128)
SCALE, MINIMUM = _half("scale"), _half("minimum")


@dataclass(frozen=True)
class GGMLType:
    """One tensor type of GGML.

    name, number  as in the file format ("Q4_0", 2)
    grid          the grid whose values it holds
    block         weights per block; rows must be a multiple
    fields        of a block in storage order; empty for plain floats
    """

    name: str
    number: int
    grid: Grid
    block: int
    fields: tuple[Field, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return sum(field.n_bytes for field in self.fields) or int(self.grid.bits_per_weight(1)) // 8

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of a tensor of this shape (the last dimension is the row). Raises ValueError."""
        *outer, cols = shape
        if cols % self.block:
            raise ValueError(f"rows of {cols} weights do not divide into {self.name} blocks of {self.block}")
        rows = 1
        for n in outer:
            rows *= n
        return rows * (cols // self.block) * self.block_bytes

    def pack(self, quantized: QuantizedTensor) -> Tensor:
        """The bytes of a quantized matrix as a flat uint8 tensor. Raises ValueError for another grid."""
        if quantized.grid != self.grid:
            raise ValueError(f"{self.name} holds {self.grid}, not {quantized.grid}")
        if not self.fields:
            return quantized.codes.contiguous().view(-1).view(torch.uint8)
        codes = quantized.codes.reshape(-1, self.block)
        pieces = [
            field.pack(codes if field.name == "codes" else quantized.params[field.name].reshape(-1))
            for field in self.fields
        ]
        return torch.cat(pieces, dim=1).view(-1)

    def unpack(self, raw: Tensor, shape: tuple[int, int]) -> QuantizedTensor:
        """The quantized matrix in flat uint8 bytes. Raises ValueError when the size does not match the shape."""
        if raw.numel() != self.n_bytes(shape):
            raise ValueError(f"{self.name} {list(shape)} takes {self.n_bytes(shape)} bytes, found {raw.numel()}")
        if isinstance(self.grid, Float):
            return QuantizedTensor(self.grid, shape, raw.contiguous().view(self.grid.dtype).view(shape), {})
        codes = torch.zeros(shape, dtype=torch.uint8).view(-1, self.block)
        params = {}
        for field, piece in zip(self.fields, raw.view(-1, self.block_bytes).split(self._sizes, dim=1), strict=True):
            if field.name == "codes":
                codes |= field.unpack(piece)
            else:
                params[field.name] = field.unpack(piece).view(shape[0], -1)
        return QuantizedTensor(self.grid, shape, codes.view(shape), params)

    @property
    def _sizes(self) -> list[int]:
        return [field.n_bytes for field in self.fields]


_TYPES = (
    GGMLType("F32", 0, GRIDS["f32"], 1, ()),
    GGMLType("F16", 1, GRIDS["f16"], 1, ()),
    GGMLType("BF16", 30, GRIDS["bf16"], 1, ()),
    GGMLType("Q4_0", 2, GRIDS["q4_0"], BLOCK, (SCALE, NIBBLES)),
    GGMLType("Q4_1", 3, GRIDS["q4_1"], BLOCK, (SCALE, MINIMUM, NIBBLES)),
    GGMLType("Q5_0", 6, GRIDS["q5_0"], BLOCK, (SCALE, FIFTH_BITS, NIBBLES)),
    GGMLType("Q5_1", 7, GRIDS["q5_1"], BLOCK, (SCALE, MINIMUM, FIFTH_BITS, NIBBLES)),
    GGMLType("Q8_0", 8, GRIDS["q8_0"], BLOCK, (SCALE, SIGNED_BYTES)),
    GGMLType("IQ4_NL", 20, GRIDS["iq4_nl"], BLOCK, (SCALE, NIBBLES)),
)
GGML_TYPES: dict[str, GGMLType] = {kind.name: kind for kind in _TYPES}


def ggml_type_of(grid: Grid) -> GGMLType | None:
    """The GGML type that holds exactly this grid, or None when GGML has none."""
    return next((kind for kind in _TYPES if kind.grid == grid), None)
