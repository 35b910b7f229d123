"""compressed-tensors checkpoints: a linear layer under names that depend on its format.

    pack-quantized        weight_packed int32 [out, ceil(in * b / 32)], weight_scale [out, groups],
                          weight_shape int64 [2], weight_zero_point int32 [ceil(out * b / 32), groups]
    int-quantized         weight int8 [out, in], weight_scale [out, 1] or [out, groups], weight_zero_point int8
    float-quantized       weight float8 (E4M3) [out, in], weight_scale [out, 1] or [1]
    mxfp4-pack-quantized  weight_packed uint8 [out, in / 2], weight_scale uint8 [out, in / 32]
    nvfp4-pack-quantized  weight_packed uint8 [out, in / 2], weight_scale float8 (E4M3) [out, in / 16],
                          weight_global_scale float32 [1], which scales are divided by

Integers are signed: what is stored is code - 2^(b-1), in packed words with that offset added again, so that words hold
codes as they are here. Packing is one dense stream of bits since May 2026 (the package's pull request 715); before it,
words held 32 // b whole values, which differs at 3, 5, 6 and 7 bits.
Source: docs/formats.md; checked against the package itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from whit.grids.grid import Grid, Spec
from whit.grids.levels import Integers, Table
from whit.grids.named import FP4_LEVELS, FP8_LEVELS
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import Offset, PerChannel, PerGroup, PerTensor, Scaled, integer_grid
from whit.layouts.words import WORD, n_words, pack_words, unpack_words

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
MXFP4, NVFP4 = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
NAIVE = "naive-quantized"  # another label of the layouts of INT and FLOAT
FORMATS = (PACKED, INT, FLOAT, NAIVE, MXFP4, NVFP4)
SCALES = (torch.float16, torch.bfloat16, torch.float32)
FP4_SIGN = 8


@dataclass(frozen=True)
class CompressedTensors:
    """The layout of one scheme.

    format  one of FORMATS
    dense   whether 3, 5, 6 and 7 bits are packed as one stream, as the package does now
    """

    format: str
    dense: bool = True

    def _as(self, grid: Grid) -> str:
        """The format whose tensors these are: NAIVE is a label alone."""
        if self.format != NAIVE:
            return self.format
        return FLOAT if isinstance(grid, Scaled) and grid.levels == FP8_LEVELS else INT

    def refuses(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why a [out, in] matrix on a grid has no place here; None when it has."""
        if not isinstance(grid, Scaled) or grid.offset is Offset.MINIMUM:
            return "compressed-tensors holds one level of scales with zero points or none"
        form = self._as(grid)
        if form == MXFP4:
            fits = grid.levels == FP4_LEVELS and grid.scheme == PerGroup(32)
        elif form == NVFP4:
            fits = grid.levels == FP4_LEVELS and grid.scheme == PerGroup(16)
            fits = fits and grid.scale_dtype == torch.float8_e4m3fn
        elif form == FLOAT:
            fits = grid.levels == FP8_LEVELS and grid.offset is Offset.NONE
        else:
            fits = isinstance(grid.levels, Integers) and (form == PACKED or grid.levels.bits == 8)
        if not fits:
            return f"{self.format} does not hold this grid; compressed-tensors has integers, fp8, mxfp4 and nvfp4"
        if self.format != NVFP4 and grid.unit != 1:
            return f"{self.format} has no global scale"
        if self.format not in (MXFP4, NVFP4) and grid.scale_dtype not in SCALES:
            return f"scales of {self.format} are floats of 16 or 32 bits"
        if shape[1] % grid.spans(shape[1])[0]:
            return f"{shape[1]} inputs do not divide into groups of {grid.spans(shape[1])[0]}"
        return None

    def schema(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shape and dtype of every stored tensor."""
        assert isinstance(grid, Scaled)
        rows, cols = shape
        scale = grid.schema(shape)["scale"]
        blocks = (1,) if isinstance(grid.scheme, PerTensor) else scale.shape
        if self.format == MXFP4:
            return {"weight_packed": Spec((rows, cols // 2), torch.uint8), "weight_scale": Spec(blocks, torch.uint8)}
        if self.format == NVFP4:
            packed, overall = Spec((rows, cols // 2), torch.uint8), Spec((1,), torch.float32)
            return {"weight_packed": packed, "weight_scale": Spec(blocks, scale.dtype), "weight_global_scale": overall}
        if self._as(grid) == FLOAT:
            return {"weight": Spec(shape, torch.float8_e4m3fn), "weight_scale": Spec(blocks, scale.dtype)}
        zero = grid.offset is Offset.ZERO_POINT
        if self._as(grid) == INT:
            found = {"weight": Spec(shape, torch.int8), "weight_scale": Spec(blocks, scale.dtype)}
            return found | ({"weight_zero_point": Spec(blocks, torch.int8)} if zero else {})
        bits = grid.levels.bits
        found = {
            "weight_packed": Spec((rows, n_words(cols, bits)), torch.int32),
            "weight_scale": Spec(blocks, scale.dtype),
            "weight_shape": Spec((2,), torch.int64),
        }
        if zero:
            found["weight_zero_point"] = Spec((n_words(rows, bits), scale.shape[1]), torch.int32)
        return found

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors. Raises ValueError for a grid or shape that this format cannot hold."""
        reason = self.refuses(quantized.grid, quantized.shape)
        if reason:
            raise ValueError(reason)
        grid, codes, params = quantized.grid, quantized.codes, quantized.params
        assert isinstance(grid, Scaled)
        scale = params["scale"].flatten() if isinstance(grid.scheme, PerTensor) else params["scale"]
        if self.format in (MXFP4, NVFP4):
            nibbles = _fp4_nibbles(codes)
            packed = (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).contiguous()
            if self.format == MXFP4:
                return {"weight_packed": packed, "weight_scale": scale.view(torch.uint8)}
            overall = torch.tensor([1 / grid.unit], dtype=torch.float32)
            return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": overall}
        if self._as(grid) == FLOAT:
            return {"weight": grid.levels.values(codes).to(torch.float8_e4m3fn), "weight_scale": scale}
        if self._as(grid) == INT:
            found = {"weight": _signed(codes), "weight_scale": scale}
            return found | ({"weight_zero_point": _signed(params["zero"])} if "zero" in params else {})
        bits = grid.levels.bits
        found = {
            "weight_packed": pack_words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(quantized.shape),
        }
        if "zero" in params:
            found["weight_zero_point"] = pack_words(params["zero"].T, bits).T.contiguous()
        return found

    def unpack(self, parts: Mapping[str, Tensor], weights: Mapping[str, Any]) -> QuantizedTensor:
        """The matrix in stored tensors.

        weights  the scheme of the weights as in config.json: num_bits, strategy, group_size
        Raises ValueError when the tensors do not belong together or the scheme is not one of these.
        """
        scale = parts["weight_scale"]
        if self.format in (MXFP4, NVFP4):
            return self._fp4(parts)
        if scale.dtype not in SCALES:
            raise ValueError(f"weight_scale is {scale.dtype}, expected a float of 16 or 32 bits")
        if self.format in (INT, FLOAT, NAIVE):
            weight = parts["weight"]
            rows, cols = weight.shape
            scheme = _scheme(scale, (rows, cols), weights)
            scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
            if weight.dtype == torch.float8_e4m3fn:
                grid = Scaled(FP8_LEVELS, scheme, scale_dtype=scale.dtype)
                return QuantizedTensor(grid, (rows, cols), _fp8_codes(weight), {"scale": scale.contiguous()})
            if weight.dtype != torch.int8:
                raise ValueError(f"weight is {weight.dtype}, expected int8 or float8 (E4M3)")
            params, symmetric = {"scale": scale.contiguous()}, "weight_zero_point" not in parts
            if not symmetric:
                params["zero"] = _unsigned(parts["weight_zero_point"].reshape(scale.shape))
            grid = integer_grid(8, scheme, symmetric, scale.dtype)
            return QuantizedTensor(grid, (rows, cols), _unsigned(weight), params)
        return self._unpacked(parts, weights)

    def _fp4(self, parts: Mapping[str, Tensor]) -> QuantizedTensor:
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
        rows, cols = nibbles.shape
        size = 32 if self.format == MXFP4 else 16
        if tuple(scale.shape) != (rows, cols // size):
            raise ValueError(f"weight_scale is {list(scale.shape)}, expected {[rows, cols // size]}")
        grid = Scaled(FP4_LEVELS, PerGroup(size), scale_dtype=torch.float8_e8m0fnu)
        if self.format == NVFP4:
            overall = parts["weight_global_scale"].float()
            if overall.numel() != 1 or not 0 < overall.item() < float("inf") or scale.dtype != torch.float8_e4m3fn:
                raise ValueError("weight_global_scale is not one positive number beside scales of FP8 (E4M3)")
            grid = replace(grid, scale_dtype=scale.dtype, unit=1 / overall.item())
        return QuantizedTensor(grid, (rows, cols), _fp4_codes(nibbles), {"scale": scale.view(grid.scale_dtype)})

    def _unpacked(self, parts: Mapping[str, Tensor], weights: Mapping[str, Any]) -> QuantizedTensor:
        bits, scale = int(weights["num_bits"]), parts["weight_scale"]
        rows, cols = (int(n) for n in parts["weight_shape"])
        scheme = _scheme(scale, (rows, cols), weights)
        codes = self._words(parts["weight_packed"], bits, cols)
        if codes.shape[0] != rows:
            raise ValueError(f"weight_packed has {codes.shape[0]} rows, weight_shape says {rows}")
        scale = scale.reshape(1, 1) if isinstance(scheme, PerTensor) else scale
        params, symmetric = {"scale": scale.contiguous()}, "weight_zero_point" not in parts
        if not symmetric:
            params["zero"] = self._words(parts["weight_zero_point"].T.contiguous(), bits, rows).T.contiguous()
        return QuantizedTensor(integer_grid(bits, scheme, symmetric, scale.dtype), (rows, cols), codes, params)

    def _words(self, words: Tensor, bits: int, cols: int) -> Tensor:
        if self.dense or WORD % bits == 0:
            return unpack_words(words, bits, cols)
        per_word = WORD // bits
        if words.shape[1] != -(-cols // per_word):
            raise ValueError(f"{cols} values of {bits} bits take {-(-cols // per_word)} words, found {words.shape[1]}")
        shifts = torch.arange(per_word, dtype=torch.int32) * bits
        values = (words[..., None] >> shifts) & ((1 << bits) - 1)
        return values.flatten(1)[:, :cols].to(torch.uint8).contiguous()


def format_of(grid: Grid, activations: bool) -> str:
    """The format that holds a grid, with or without quantized activations; for a grid that none holds, one of integers.

    Weights in FP8 alone go by another label than those whose inputs are FP8 too.
    """
    if not isinstance(grid, Scaled):
        return PACKED
    if grid.levels == FP4_LEVELS:
        return MXFP4 if grid.scale_dtype == torch.float8_e8m0fnu else NVFP4
    if grid.levels == FP8_LEVELS:
        return FLOAT if activations else NAIVE
    return INT if activations else PACKED


def is_dense(words: int, bits: int, cols: int) -> bool:
    """Whether rows of `cols` values in so many words are one stream of bits; the older packing takes more words."""
    return words == n_words(cols, bits)


def _scheme(scale: Tensor, shape: tuple[int, int], weights: Mapping[str, Any]) -> PerTensor | PerChannel | PerGroup:
    rows, cols = shape
    strategy = weights.get("strategy")
    if scale.numel() == 1 and strategy == "tensor":
        return PerTensor()
    if strategy == "channel" and scale.numel() == rows:
        return PerChannel()
    size = weights.get("group_size")
    if strategy == "group" and isinstance(size, int) and size > 0 and tuple(scale.shape) == (rows, -(-cols // size)):
        return PerGroup(size)
    raise ValueError(f"weight_scale {list(scale.shape)} does not fit strategy {strategy!r}, group size {size}")


def _signed(codes: Tensor) -> Tensor:
    """int8 of codes with an offset of 128."""
    return (codes ^ 128).view(torch.int8)


def _unsigned(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8) ^ 128


def _fp4_nibbles(codes: Tensor) -> Tensor:
    """Sign and magnitude of FP4_LEVELS' codes."""
    return _fp4_tables()[0][codes.int()]


def _fp4_codes(nibbles: Tensor) -> Tensor:
    return _fp4_tables()[1][nibbles.int()]


@cache
def _fp4_tables() -> tuple[Tensor, Tensor]:
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    codes = [FP4_LEVELS.index(-m if sign else m) for sign in (0, 1) for m in magnitudes]
    nibbles = [magnitudes.index(abs(x)) + (FP4_SIGN if x < 0 else 0) for x in FP4_LEVELS.numbers]
    return torch.tensor(nibbles, dtype=torch.uint8), torch.tensor(codes, dtype=torch.uint8)


def _fp8_codes(weight: Tensor) -> Tensor:
    """Codes of FP8_LEVELS. Raises ValueError for NaN."""
    table: Table = FP8_LEVELS
    values = weight.float()
    if torch.isnan(values).any():
        raise ValueError("weight holds NaN")
    return table.nearest(values)
