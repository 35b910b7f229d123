"""Written files decoded a second time, by other code than the one that wrote them.

GGUF files by the NumPy dequantizers of the `gguf` package, whose reader can check the header too. Folders by the
formulas of their formats as a runtime applies them, label for label: bits are taken apart by NumPy, no decoder of
whit.layouts is used, and where a label lies no guess is made. What is not known here (such as packing of before May
2026) is left to the first decoder and named in `alone`.
Source: docs/formats.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.source import TensorInfo
from whit.errors import BrokenFileError, ModelError
from whit.grids.codebook import Codebook
from whit.grids.indexed import Indexed
from whit.grids.levels import Integers, Table
from whit.grids.named import grid_named
from whit.grids.scaled import Scaled
from whit.grids.sparse import Sparse
from whit.layouts.ggml import ggml_type_of

Parts = Mapping[str, Tensor]
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of output 0, 1, 2, ... within a word
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GPTQ_LABELS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point


class SecondGGUF:
    """The tensors of a GGUF file by the dequantizers of the `gguf` package, under GGUF names."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def names(self) -> Sequence[str]:
        """As the first reader lists them."""
        return self._file.names()

    def info(self, name: str) -> TensorInfo:
        """As the first reader has it."""
        return self._file.info(name)

    def read(self, name: str) -> Tensor:
        """The values, float32, in the shape that the header says. Raises ModelError for a type without a decoder."""
        info = self._file.info(name)
        raw = self._file.raw(name).numpy().reshape(*info.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):  # broken blocks overflow; whoever reads them looks for that
                values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[info.dtype])
        except NotImplementedError:
            raise ModelError(
                f"{self._file.path}: tensor {name} has type {info.dtype}, which cannot be decoded."
            ) from None
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(info.shape)


def check_header(file: GGUFFile) -> None:
    """Raise BrokenFileError when the package's own reader finds other tensors, or finds them elsewhere.

    It makes an object per token of the vocabulary, which takes seconds.
    """
    try:
        found = {each.name: each for each in gguf.GGUFReader(file.path).tensors}
    except Exception as error:  # it raises whatever NumPy does
        raise BrokenFileError(f"{file.path}: the gguf package cannot read it ({error}).") from error
    for name in file.names():
        info, other = file.info(name), found.get(name)
        here = file.offset(name), info.n_bytes, info.dtype
        there = None if other is None else (int(other.data_offset), int(other.n_bytes), other.tensor_type.name)
        if here != there:
            raise BrokenFileError(f"{file.path}: tensor {name} is {here} here and {there} in the gguf package.")


class SecondFolder:
    """Decodes the layers of a quantized folder; `decode` is what QuantizedTensors takes.

    alone  layers that only the first decoder knows, found so far
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """From the content of quantization_config."""
        self._config = config
        self.alone: list[str] = []

    def decode(self, layer: str, parts: Parts) -> Tensor | None:
        """[out, in] float32 from the stored tensors of a layer, None for a form that is not known here.

        Raises ValueError, KeyError or RuntimeError when they do not fit together.
        """
        method = self._config.get("quant_method")
        known: dict[str, Callable[[str, Parts], Tensor | None]] = {
            "gptq": self._gptq,
            "awq": lambda layer, parts: _awq(parts),
            "auto-round": self._auto_round,
            "compressed-tensors": self._compressed,
            "whit": self._native,
        }
        W = known[str(method)](layer, parts)
        if W is None:
            self.alone.append(layer)
        return W

    def _auto_round(self, layer: str, parts: Parts) -> Tensor:
        return _awq(parts) if "awq" in str(self._config.get("packing_format")) else _gptq(parts, 1)

    def _gptq(self, layer: str, parts: Parts) -> Tensor:
        label = str(self._config.get("checkpoint_format") or self._config.get("format") or "gptq")
        return _gptq(parts, GPTQ_LABELS[label])

    def _compressed(self, layer: str, parts: Parts) -> Tensor | None:
        group = self._group(layer)
        form, weights = str(group.get("format") or self._config.get("format")), group["weights"]
        scale = parts["weight_scale"]
        if form in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
            packed = parts["weight_packed"]
            nibbles = torch.stack([packed % 16, packed // 16], dim=2).flatten(1)  # [rows, cols]
            if form.startswith("mxfp4"):
                exponent = scale.view(torch.uint8).int() - 127
                scale = torch.ldexp(torch.ones(exponent.shape), exponent)
            else:
                scale = scale.float() / parts["weight_global_scale"].float()
            values = torch.tensor([*FP4, *(-x for x in FP4)])[nibbles.long()]
            return values * _wide(scale, values)
        if "weight" in parts:
            values = parts["weight"].float()
            zero = parts.get("weight_zero_point")
            return (values if zero is None else values - _wide(zero.float(), values)) * _wide(scale.float(), values)
        bits, (rows, cols) = int(weights["num_bits"]), (int(n) for n in parts["weight_shape"])
        if parts["weight_packed"].shape[1] != -(-cols * bits // 32):
            return None
        codes = _codes(parts["weight_packed"], bits, cols).float()
        half = float(1 << bits - 1)
        if "weight_zero_point" not in parts:
            return (codes - half) * _wide(scale.float(), codes)
        zeros = _codes(parts["weight_zero_point"].T.contiguous(), bits, rows).T.float()
        return (codes - _wide(zeros, codes)) * _wide(scale.float(), codes)

    def _group(self, layer: str) -> Mapping[str, Any]:
        groups = list(self._config["config_groups"].values())
        for group in groups:
            for target in group["targets"]:
                if target == layer or (target.startswith("re:") and re.match(target[3:], layer)):
                    return dict(group)
        return next(group for group in groups if "Linear" in group["targets"] or "Embedding" in group["targets"])

    def _native(self, layer: str, parts: Parts) -> Tensor | None:
        grid = grid_named(self._config["grids"][layer])
        if "weight_ggml" in parts:
            kind = ggml_type_of(grid)
            assert kind is not None  # the first decoder has looked
            values = gguf.quants.dequantize(parts["weight_ggml"].numpy(), gguf.GGMLQuantizationType[kind.name])
            return torch.from_numpy(np.array(values, dtype=np.float32))
        rows, cols = (int(n) for n in parts["weight_shape"])
        table = grid.base if isinstance(grid, Sparse) else grid
        if isinstance(table, Codebook):
            codes, levels = _codes(parts["weight_codes"], table.bits, cols).long(), parts["weight_levels"].float()
            tables = levels.reshape(levels.shape[0], -1, 2**table.bits)  # [rows or 1, groups, levels]
            tables = tables.expand(rows, -1, -1).repeat_interleave(cols // tables.shape[1], dim=1)
            found = tables.gather(2, codes[..., None])[..., 0]
            if isinstance(grid, Sparse):
                every = torch.arange(rows)[:, None].expand_as(parts["weight_columns"])
                found[every, parts["weight_columns"].long()] += parts["weight_values"].float()
            return found
        base = grid.base if isinstance(grid, Indexed) else grid
        if not isinstance(base, Scaled):
            return None
        codes = _codes(parts["weight_codes"], base.levels.bits, cols)
        if isinstance(base.levels, Integers):
            values = codes.float() - base.levels.zero
        elif isinstance(base.levels, Table):
            values = torch.tensor(base.levels.numbers, dtype=torch.float32)[codes.long()]
        else:
            return None
        index = parts["weight_g_idx"].long() if "weight_g_idx" in parts else None
        scale = _wide(parts["weight_scale"].float() * base.unit, values, index)
        if "weight_zero" in parts:
            return (values - _wide(parts["weight_zero"].float(), values, index)) * scale
        if "weight_minimum" in parts:
            return values * scale + _wide(parts["weight_minimum"].float(), values, index)
        return values * scale


def _gptq(parts: Parts, add: int) -> Tensor:
    outputs = parts["scales"].shape[1]
    bits = parts["qzeros"].shape[1] * 32 // outputs
    inputs = parts["qweight"].shape[0] * 32 // bits
    codes = _codes(parts["qweight"].T.contiguous(), bits, inputs).float()  # [out, in]
    zeros = ((_codes(parts["qzeros"], bits, outputs).int() + add) % (1 << bits)).float()  # [groups, out]
    groups = parts["scales"].shape[0]
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // -(-inputs // groups)
    return (codes - zeros[group].T) * parts["scales"].float()[group].T


def _awq(parts: Parts) -> Tensor:
    codes, zeros = (_awq_values(parts[name]) for name in ("qweight", "qzeros"))  # [in, out], [groups, out]
    size = codes.shape[0] // zeros.shape[0]
    scale = parts["scales"].float().repeat_interleave(size, dim=0)
    return ((codes - zeros.repeat_interleave(size, dim=0)) * scale).T.contiguous()


def _awq_values(words: Tensor) -> Tensor:
    unsigned = words.numpy().view(np.uint32)
    values = np.stack([unsigned // np.uint32(1 << shift) % np.uint32(16) for shift in AWQ_SHIFTS], axis=2)
    return torch.from_numpy(values.reshape(words.shape[0], -1).astype(np.float32))


def _codes(words: Tensor, bits: int, n: int) -> Tensor:
    """uint8 [rows, n] of rows of int32 words that are one stream of bits each, lowest first."""
    single = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    fields = single[:, : n * bits].reshape(len(single), n, bits)
    return torch.from_numpy(np.packbits(fields, axis=2, bitorder="little")[..., 0])


def _wide(per_group: Tensor, values: Tensor, index: Tensor | None = None) -> Tensor:
    """One number per group, row or matrix, for every one of the values [rows, cols]."""
    if per_group.numel() == 1:
        return per_group.reshape(1, 1)
    per_group = per_group.reshape(values.shape[0], -1)
    if index is not None:
        return per_group[:, index]
    size = -(-values.shape[1] // per_group.shape[1])
    return per_group.repeat_interleave(size, dim=1)[:, : values.shape[1]]
