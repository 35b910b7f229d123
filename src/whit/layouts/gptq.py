"""GPTQ checkpoints: a linear layer as `qweight`, `qzeros`, `scales` and `g_idx`.

    qweight [in * b / 32, out] int32, codes along the inputs     scales [groups, out] half
    qzeros  [groups, out * b / 32] int32, zeros along the outputs    g_idx [in] int32, the group of every input

Version 1 ("gptq") stores zero - 1 in every field and readers add 1; version 2 ("gptq_v2") stores the zero. Files exist
whose label lies; in symmetric ones the constant itself tells, 2^(b-1) or one less, and what it tells counts. In files
that have zero points any constant may be meant, and the label counts.
Source: docs/formats.md, section GPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.grid import Grid, Spec
from whit.grids.indexed import INDEX, Indexed
from whit.grids.levels import Integers
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import Offset, PerChannel, PerGroup, Scaled, integer_grid
from whit.layouts.words import WORD, n_words, pack_words, unpack_words

BITS = (2, 3, 4, 8)
USUAL = (128, 64, 32)  # group sizes
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GPTQ:
    """The layout.

    version    1 or 2, how zero points are stored
    symmetric  whether all zero points read may be taken for the middle, so that the constant shows a wrong version
    """

    version: int = 2
    symmetric: bool = True

    def refuses(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why a [out, in] matrix on a grid has no place here; None when it has."""
        base = grid.base if isinstance(grid, Indexed) else grid
        if not isinstance(base, Scaled) or not isinstance(base.levels, Integers) or base.offset is Offset.MINIMUM:
            return "GPTQ holds integer grids with zero points or none"
        if base.levels.bits not in BITS or not isinstance(base.scheme, PerGroup | PerChannel):
            return f"GPTQ holds {', '.join(map(str, BITS))} bits, per group or output channel"
        if base.scale_dtype != torch.float16:
            return "scales of GPTQ are half precision"
        rows, cols = shape
        bits = base.levels.bits
        if cols * bits % WORD or rows * bits % WORD:
            return f"{rows} outputs and {cols} inputs of {bits} bits do not fill 32-bit words"
        if isinstance(grid, Scaled) and cols % grid.spans(cols)[0]:
            return f"{cols} inputs do not divide into groups of {grid.spans(cols)[0]}"
        return None

    def schema(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shape and dtype of every stored tensor."""
        rows, cols = shape
        bits, groups = _base(grid).levels.bits, _groups(grid, cols)
        return {
            "qweight": Spec((cols * bits // WORD, rows), torch.int32),
            "qzeros": Spec((groups, rows * bits // WORD), torch.int32),
            "scales": Spec((groups, rows), torch.float16),
            "g_idx": Spec((cols,), torch.int32),
        }

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors. Raises ValueError for a grid or shape that GPTQ cannot hold."""
        reason = self.refuses(quantized.grid, quantized.shape)
        if reason:
            raise ValueError(reason)
        base, params = _base(quantized.grid), quantized.params
        bits, (rows, cols) = base.levels.bits, quantized.shape
        groups = _groups(quantized.grid, cols)
        if "zero" in params:
            zeros = params["zero"].int()
        else:
            zeros = torch.full((rows, groups), _middle(bits), dtype=torch.int32)
        if self.version == 1:
            zeros = (zeros - 1) & (2**bits - 1)
        natural = torch.arange(cols, dtype=torch.int32) // (cols // groups)
        return {
            "qweight": pack_words(quantized.codes, bits).T.contiguous(),
            "qzeros": pack_words(zeros.T, bits),
            "scales": params["scale"].T.contiguous(),
            "g_idx": params.get(INDEX, natural),
        }

    def unpack(self, parts: Mapping[str, Tensor], bits: int) -> QuantizedTensor:
        """The matrix in stored tensors; symmetric when all of its zero points are the middle one.

        `g_idx` may be missing. Raises ValueError when the shapes do not belong together.
        """
        rows, cols = parts["qweight"].shape[1], parts["qweight"].shape[0] * WORD // bits
        groups = parts["scales"].shape[0]
        expected = {"qzeros": (groups, n_words(rows, bits)), "scales": (groups, rows), "g_idx": (cols,)}
        for name, shape in expected.items():
            if name in parts and tuple(parts[name].shape) != shape:
                raise ValueError(f"{name} is {list(parts[name].shape)}, expected {list(shape)}")
        codes = unpack_words(parts["qweight"].T.contiguous(), bits, cols)
        zeros = self.zeros(parts["qzeros"], bits, rows)
        symmetric = bool((zeros == _middle(bits)).all())
        params = {"scale": parts["scales"].T.contiguous().half()}
        if not symmetric:
            params["zero"] = zeros
        size = -(-cols // groups)
        index = parts.get("g_idx", torch.arange(cols) // size).int()
        if cols % groups == 0 and torch.equal(index.long(), torch.arange(cols) // size):
            scheme = PerChannel() if groups == 1 else PerGroup(size)
            return QuantizedTensor(integer_grid(bits, scheme, symmetric), (rows, cols), codes, params)
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise ValueError(f"g_idx names group {int(index.max())}, but there are {groups}")
        size = next((n for n in (*USUAL, *range(1, cols + 1)) if -(-cols // n) == groups), 0)
        if not size:
            raise ValueError(f"{groups} groups do not share {cols} inputs")
        grid = Indexed(integer_grid(bits, PerGroup(size), symmetric))
        return QuantizedTensor(grid, (rows, cols), codes, {**params, INDEX: index})

    def zeros(self, qzeros: Tensor, bits: int, rows: int) -> Tensor:
        """Zero points [rows, groups] uint8 of stored ones [groups, words] int32."""
        stored = unpack_words(qzeros, bits, rows).T.contiguous()
        add = (self.version == 1) != self.mislabelled(qzeros, bits, rows)
        return (stored + add) & (2**bits - 1)

    def mislabelled(self, qzeros: Tensor, bits: int, rows: int) -> bool:
        """Whether zero points [groups, words] int32 are the middle one as the other version stores it."""
        wrong = _middle(bits) - (self.version == 2)
        return self.symmetric and bool((unpack_words(qzeros, bits, rows) == wrong).all())


def _base(grid: Grid) -> Scaled:
    base = grid.base if isinstance(grid, Indexed) else grid
    assert isinstance(base, Scaled)
    return base


def _groups(grid: Grid, cols: int) -> int:
    return -(-cols // grid.size) if isinstance(grid, Indexed) else cols // grid.spans(cols)[0]


def _middle(bits: int) -> int:
    return 1 << (bits - 1)
