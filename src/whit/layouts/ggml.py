"""GGML blocks: quantized tensors as the bytes that llama.cpp's runtime reads, and back.

A row is cut into blocks of 32 or 256 weights and each block is a record of fields. A type is the list of its
fields in storage order; sizes follow from the list. Everything is little-endian.
Source: the GGML block formats as listed in docs/formats.md; checked bit for bit against the `gguf` package.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.floats import Float
from whit.grids.grid import Grid
from whit.grids.named import GRIDS
from whit.grids.quantized import QuantizedTensor
from whit.layouts import ggml_lattice
from whit.layouts.ggml_fields import (
    EXPONENT,
    FIFTH_BITS,
    FP4_NIBBLES,
    IQ4_SUBS,
    MINIMUM,
    Q2_SUBS,
    Q3_SUBS,
    Q4_SUBS,
    Q5_BITS,
    Q6_LOW,
    Q6_SUBS,
    SCALE,
    SIGNED_BYTES,
    TRITS,
    Field,
    nibbles,
    pairs,
    side_by_side,
    single_bits,
)

BLOCK = 32
SUPERBLOCK = 256


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
        n = quantized.codes.numel() * self.grid.step // self.block
        block = {"codes": quantized.codes.reshape(n, -1)}
        for name, value in quantized.params.items():
            block[name] = value.reshape(n) if value.numel() == n else value.reshape(n, -1)
        return side_by_side([field.pack(block) for field in self.fields]).view(-1)

    def unpack(self, raw: Tensor, shape: tuple[int, int]) -> QuantizedTensor:
        """The quantized matrix in flat uint8 bytes. Raises ValueError when the size does not match the shape."""
        if raw.numel() != self.n_bytes(shape):
            raise ValueError(f"{self.name} {list(shape)} takes {self.n_bytes(shape)} bytes, found {raw.numel()}")
        if isinstance(self.grid, Float):
            return QuantizedTensor(self.grid, shape, raw.contiguous().view(self.grid.dtype).view(shape), {})
        parts: dict[str, Tensor] = {}
        for field, piece in zip(self.fields, raw.view(-1, self.block_bytes).split(self._sizes, dim=1), strict=True):
            for name, value in field.unpack(piece).items():
                parts[name] = parts[name] | value if name in parts else value  # codes may be spread over fields
        codes = parts.pop("codes").reshape(self.grid.code_spec(shape).shape)
        params = {name: value.reshape(shape[0], -1) for name, value in parts.items()}
        return QuantizedTensor(self.grid, shape, codes, params)

    @property
    def _sizes(self) -> list[int]:
        return [field.n_bytes for field in self.fields]


_TYPES = (
    GGMLType("F32", 0, GRIDS["f32"], 1, ()),
    GGMLType("F16", 1, GRIDS["f16"], 1, ()),
    GGMLType("BF16", 30, GRIDS["bf16"], 1, ()),
    GGMLType("Q4_0", 2, GRIDS["q4_0"], BLOCK, (SCALE, nibbles(32, 32))),
    GGMLType("Q4_1", 3, GRIDS["q4_1"], BLOCK, (SCALE, MINIMUM, nibbles(32, 32))),
    GGMLType("Q5_0", 6, GRIDS["q5_0"], BLOCK, (SCALE, FIFTH_BITS, nibbles(32, 32))),
    GGMLType("Q5_1", 7, GRIDS["q5_1"], BLOCK, (SCALE, MINIMUM, FIFTH_BITS, nibbles(32, 32))),
    GGMLType("Q8_0", 8, GRIDS["q8_0"], BLOCK, (SCALE, SIGNED_BYTES)),
    GGMLType("IQ4_NL", 20, GRIDS["iq4_nl"], BLOCK, (SCALE, nibbles(32, 32))),
    GGMLType("Q2_K", 10, GRIDS["q2_k"], SUPERBLOCK, (Q2_SUBS, pairs(256, 128, 0), SCALE, MINIMUM)),
    GGMLType("Q3_K", 11, GRIDS["q3_k"], SUPERBLOCK, (single_bits(256, 2), pairs(256, 128, 0), Q3_SUBS, SCALE)),
    GGMLType("Q4_K", 12, GRIDS["q4_k"], SUPERBLOCK, (SCALE, MINIMUM, Q4_SUBS, nibbles(256, 64))),
    GGMLType("Q5_K", 13, GRIDS["q5_k"], SUPERBLOCK, (SCALE, MINIMUM, Q4_SUBS, Q5_BITS, nibbles(256, 64))),
    GGMLType("Q6_K", 14, GRIDS["q6_k"], SUPERBLOCK, (Q6_LOW, pairs(256, 128, 4), Q6_SUBS, SCALE)),
    GGMLType("IQ4_XS", 23, GRIDS["iq4_xs"], SUPERBLOCK, (SCALE, IQ4_SUBS, nibbles(256, 32))),
    GGMLType("MXFP4", 39, GRIDS["mxfp4"], BLOCK, (EXPONENT, FP4_NIBBLES)),
    GGMLType("TQ1_0", 34, GRIDS["tq1_0"], SUPERBLOCK, (TRITS, SCALE)),
    GGMLType("TQ2_0", 35, GRIDS["tq2_0"], SUPERBLOCK, (pairs(256, 128, 0), SCALE)),
    GGMLType("IQ2_XXS", 16, GRIDS["iq2_xxs"], SUPERBLOCK, (SCALE, *ggml_lattice.IQ2_XXS_FIELDS)),
    GGMLType("IQ2_XS", 17, GRIDS["iq2_xs"], SUPERBLOCK, (SCALE, *ggml_lattice.IQ2_XS_FIELDS)),
    GGMLType("IQ2_S", 22, GRIDS["iq2_s"], SUPERBLOCK, (SCALE, *ggml_lattice.IQ2_S_FIELDS)),
    GGMLType("IQ3_XXS", 18, GRIDS["iq3_xxs"], SUPERBLOCK, (SCALE, *ggml_lattice.IQ3_XXS_FIELDS)),
    GGMLType("IQ3_S", 21, GRIDS["iq3_s"], SUPERBLOCK, (SCALE, *ggml_lattice.IQ3_S_FIELDS)),
)
GGML_TYPES: dict[str, GGMLType] = {kind.name: kind for kind in _TYPES}


def ggml_type_of(grid: Grid) -> GGMLType | None:
    """The GGML type that holds exactly this grid, or None when GGML has none."""
    return next((kind for kind in _TYPES if kind.grid == grid), None)
