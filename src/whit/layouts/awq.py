"""AWQ checkpoints ("gemm"): a linear layer of 4 bits as `qweight`, `qzeros` and `scales`.

    qweight [in, out / 8] int32     qzeros [groups, out / 8] int32     scales [groups, out] half

Eight neighbouring outputs share a word, in the order 0 2 4 6 1 3 5 7 from the lowest nibble on. Zero points are stored
as they are. Source: docs/formats.md, section AWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.grid import Grid, Spec
from whit.grids.levels import Integers
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import Offset, PerChannel, PerGroup, Scaled, integer_grid
from whit.layouts.words import pack_words, unpack_words

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in every nibble, lowest first
MIDDLE = 8
PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class AWQ:
    """The layout."""

    def refuses(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why a [out, in] matrix on a grid has no place here; None when it has."""
        if not isinstance(grid, Scaled) or not isinstance(grid.levels, Integers) or grid.offset is Offset.MINIMUM:
            return "AWQ holds integer grids with zero points or none"
        if grid.levels.bits != BITS or not isinstance(grid.scheme, PerGroup | PerChannel):
            return "AWQ holds 4 bits, per group or output channel"
        if grid.scale_dtype != torch.float16:
            return "scales of AWQ are half precision"
        rows, cols = shape
        if rows % PER_WORD:
            return f"{rows} outputs do not fill 32-bit words"
        if cols % grid.spans(cols)[0]:
            return f"{cols} inputs do not divide into groups of {grid.spans(cols)[0]}"
        return None

    def schema(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shape and dtype of every stored tensor."""
        rows, cols = shape
        groups = cols // grid.spans(cols)[0]
        return {
            "qweight": Spec((cols, rows // PER_WORD), torch.int32),
            "qzeros": Spec((groups, rows // PER_WORD), torch.int32),
            "scales": Spec((groups, rows), torch.float16),
        }

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors. Raises ValueError for a grid or shape that AWQ cannot hold."""
        reason = self.refuses(quantized.grid, quantized.shape)
        if reason:
            raise ValueError(reason)
        scale = quantized.params["scale"]
        zeros = quantized.params.get("zero", torch.full(scale.shape, MIDDLE, dtype=torch.uint8))
        return {
            "qweight": _packed(quantized.codes.T),
            "qzeros": _packed(zeros.T),
            "scales": scale.T.contiguous(),
        }

    def unpack(self, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        """The matrix in stored tensors; symmetric when all of its zero points are 8.

        Raises ValueError when the shapes do not belong together.
        """
        cols, rows = parts["qweight"].shape[0], parts["qweight"].shape[1] * PER_WORD
        groups = parts["scales"].shape[0]
        for name, shape in {"qzeros": (groups, rows // PER_WORD), "scales": (groups, rows)}.items():
            if tuple(parts[name].shape) != shape:
                raise ValueError(f"{name} is {list(parts[name].shape)}, expected {list(shape)}")
        if cols % groups:
            raise ValueError(f"{groups} groups do not share {cols} inputs")
        codes, zeros = _unpacked(parts["qweight"]).T.contiguous(), _unpacked(parts["qzeros"]).T.contiguous()
        symmetric = bool((zeros == MIDDLE).all())
        params = {"scale": parts["scales"].T.contiguous().half()}
        if not symmetric:
            params["zero"] = zeros
        scheme = PerChannel() if groups == 1 else PerGroup(cols // groups)
        return QuantizedTensor(integer_grid(BITS, scheme, symmetric), (rows, cols), codes, params)


def _packed(values: Tensor) -> Tensor:
    """int32 [n, out / 8] of nibbles [n, out]."""
    words = values.reshape(values.shape[0], -1, PER_WORD)[..., ORDER]
    return pack_words(words.reshape(values.shape), BITS)


def _unpacked(words: Tensor) -> Tensor:
    """uint8 nibbles [n, out] of int32 [n, out / 8]."""
    n, out = words.shape[0], words.shape[1] * PER_WORD
    values = unpack_words(words, BITS, out).view(n, -1, PER_WORD)
    natural = torch.empty_like(values)
    natural[..., ORDER] = values
    return natural.view(n, out)
