"""Whit's own safetensors layout, for grids that no public format holds: the grid's name beside its codes.

    weight_codes  int32 words [rows, ...], codes along the inputs; weight_shape int64 [2]; every parameter of the grid
                  as `weight_<name>`
    weight_ggml   uint8 [rows, bytes per row], where the grid is one of GGML's superblocks: its blocks as they are

Grids are written by name in config.json, so that a file says itself how it is decoded. Source: docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whit.grids.codebook import Codebook
from whit.grids.grid import Grid, Spec
from whit.grids.indexed import Indexed
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import Scaled
from whit.grids.sparse import Sparse
from whit.layouts.ggml import GGMLType, ggml_type_of
from whit.layouts.words import n_words, pack_words, unpack_words

CODES, SHAPE, BLOCKS, PREFIX = "weight_codes", "weight_shape", "weight_ggml", "weight_"
CODED = (Scaled, Indexed, Codebook, Sparse)  # grids whose codes are packed as they are


class Native:
    """The layout."""

    def refuses(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why a [rows, cols] matrix on a grid has no place here; None when it has."""
        try:
            if not isinstance(grid, CODED):
                _blocks(grid)
            grid.schema(shape)
        except ValueError as error:
            return str(error)
        return None

    def schema(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shape and dtype of every stored tensor."""
        rows, cols = shape
        if isinstance(grid, CODED):
            params = {PREFIX + name: spec for name, spec in grid.schema(shape).items()}
            words = Spec((rows, n_words(cols, _bits(grid))), torch.int32)
            return {CODES: words, SHAPE: Spec((2,), torch.int64), **params}
        return {BLOCKS: Spec((rows, _blocks(grid).n_bytes((1, cols))), torch.uint8)}

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors. Raises ValueError for a grid that is not stored here."""
        reason = self.refuses(quantized.grid, quantized.shape)
        if reason:
            raise ValueError(reason)
        if isinstance(quantized.grid, CODED):
            params = {PREFIX + name: value.contiguous() for name, value in quantized.params.items()}
            shape = torch.tensor(quantized.shape)
            return {CODES: pack_words(quantized.codes, _bits(quantized.grid)), SHAPE: shape, **params}
        return {BLOCKS: _blocks(quantized.grid).pack(quantized).view(quantized.shape[0], -1)}

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """The matrix in stored tensors. Raises ValueError when they do not belong together."""
        if isinstance(grid, CODED):
            rows, cols = (int(n) for n in parts[SHAPE])
            params = {key.removeprefix(PREFIX): value for key, value in parts.items() if key not in (CODES, SHAPE)}
            if isinstance(grid, Sparse):
                grid.check(params, cols)
            return QuantizedTensor(grid, (rows, cols), unpack_words(parts[CODES], _bits(grid), cols), params)
        raw = parts[BLOCKS]
        return _blocks(grid).unpack(raw.reshape(-1), (raw.shape[0], self.cols(grid, raw.shape[1])))

    def cols(self, grid: Grid, n_bytes: int) -> int:
        """Columns of rows of GGML blocks with so many bytes. Raises ValueError."""
        return n_bytes // _blocks(grid).block_bytes * _blocks(grid).block


def _bits(grid: Scaled | Indexed | Codebook | Sparse) -> int:
    if isinstance(grid, Codebook):
        return grid.bits
    if isinstance(grid, Sparse):
        return grid.base.bits
    return (grid.base if isinstance(grid, Indexed) else grid).levels.bits


def _blocks(grid: Grid) -> GGMLType:
    kind = ggml_type_of(grid)
    if kind is None or not kind.fields:
        raise ValueError(f"{grid} is not stored in Whit's layout")
    return kind
