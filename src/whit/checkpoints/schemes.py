"""How the linear layers of a quantized folder are stored, by the quantization_config in its config.json.

GPTQ (both versions of zero points), AWQ gemm, compressed-tensors, AutoRound's exports in the first two, and Whit's own.
Source: docs/formats.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from whit.checkpoints.source import TensorInfo
from whit.errors import ModelError, RecipeError
from whit.grids.named import grid_named
from whit.grids.quantized import QuantizedTensor
from whit.layouts import awq, compressed, gptq, native
from whit.layouts.awq import AWQ
from whit.layouts.compressed import CompressedTensors
from whit.layouts.gptq import GPTQ
from whit.layouts.native import Native
from whit.layouts.words import WORD

Parts = Mapping[str, Tensor]
Infos = Mapping[str, TensorInfo]
GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}


class Scheme(Protocol):
    """One way to store a layer; a folder may have several."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the names of a layer's tensors; one that has the first is stored like this."""
        ...

    def shape(self, layer: str, infos: Infos, read: Callable[[str], Tensor]) -> tuple[int, int]:
        """(out, in) from headers; `read` is for suffixes of a few bytes. Raises ValueError."""
        ...

    def label(self, layer: str, infos: Infos) -> str:
        """What to call the type, such as int4-g128. Raises ValueError."""
        ...

    def decode(self, layer: str, parts: Parts) -> QuantizedTensor:
        """The matrix in a layer's tensors. Raises ValueError when they do not fit together."""
        ...


def schemes(config: Mapping[str, Any]) -> list[Scheme]:
    """What a folder with this quantization_config may hold. Raises ModelError for a format that is not read."""
    method = config.get("quant_method")
    if method == "gptq":
        return [_GPTQ(gptq_layout(config), _size(config))]
    if method == "awq":
        if str(config.get("version", "gemm")).lower() != "gemm":
            raise ModelError(f"AWQ files of version {config['version']!r} are not read; `gemm` is.")
        if int(config.get("bits", config.get("w_bit", awq.BITS))) != awq.BITS:
            raise ModelError(f"AWQ files of {config.get('bits')} bits are not read; the format has 4.")
        return [_AWQ()]
    if method == "auto-round":
        return [
            _AWQ() if "awq" in str(config.get("packing_format")) else _GPTQ(GPTQ(1, _symmetric(config)), _size(config))
        ]
    if method == "compressed-tensors":
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ModelError("quantization_config has no config_groups, without which its weights cannot be read.")
        return [_Packed(config), _Plain(config)]
    if method == "whit":
        if not isinstance(config.get("grids"), Mapping):
            raise ModelError("quantization_config has no `grids`, without which its weights cannot be read.")
        return [_Native(config["grids"], mark) for mark in (native.CODES, native.BLOCKS)]
    raise ModelError(
        f"Models quantized with {method!r} are not read. Known are gptq, awq, auto-round, compressed-tensors, "
        "whit, and mxfp4 as GPT-OSS has it."
    )


def gptq_layout(config: Mapping[str, Any]) -> GPTQ:
    """How the layers of a GPTQ folder are stored. Raises ModelError for a version that is not known."""
    label = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if label not in GPTQ_VERSIONS:
        raise ModelError(f"GPTQ files of the format {label!r} are not read; {' and '.join(GPTQ_VERSIONS)} are.")
    return GPTQ(GPTQ_VERSIONS[label], _symmetric(config))


def _symmetric(config: Mapping[str, Any]) -> bool:
    """Whether GPTQ's configuration says of no layer that it has zero points."""
    dynamic = config.get("dynamic")
    special = dynamic.values() if isinstance(dynamic, Mapping) else ()
    said = [config, *(each for each in special if isinstance(each, Mapping))]
    return all(each.get("sym", True) is not False for each in said)


def _size(config: Mapping[str, Any]) -> int:
    """The group size that GPTQ's configuration names, -1 when it names none."""
    size = config.get("group_size", config.get("q_group_size"))
    return size if isinstance(size, int) else -1


def grouped(bits: int, size: int, groups: int) -> str:
    """The label of integers in groups, or per channel when there is one."""
    return f"int{bits}-g{size}" if groups > 1 else f"int{bits}"


@dataclass(frozen=True)
class _GPTQ:
    layout: GPTQ
    size: int  # of groups, where the last one of a layer may be shorter
    suffixes: tuple[str, ...] = gptq.PARTS

    def shape(self, layer: str, infos: Infos, read: Callable[[str], Tensor]) -> tuple[int, int]:
        return infos["scales"].shape[1], infos["qweight"].shape[0] * WORD // self._bits(infos)

    def label(self, layer: str, infos: Infos) -> str:
        cols, groups = infos["qweight"].shape[0] * WORD // self._bits(infos), infos["scales"].shape[0]
        said = self.size > 0 and -(-cols // self.size) == groups
        return grouped(self._bits(infos), self.size if said else -(-cols // groups), groups)

    def decode(self, layer: str, parts: Parts) -> QuantizedTensor:
        return self.layout.unpack(parts, self._bits(parts))

    @staticmethod
    def _bits(parts: Parts | Infos) -> int:
        """From shapes: config.json has one number, layers may differ."""
        return parts["qzeros"].shape[1] * WORD // parts["scales"].shape[1]


@dataclass(frozen=True)
class _AWQ:
    suffixes: tuple[str, ...] = awq.PARTS

    def shape(self, layer: str, infos: Infos, read: Callable[[str], Tensor]) -> tuple[int, int]:
        return infos["qweight"].shape[1] * awq.PER_WORD, infos["qweight"].shape[0]

    def label(self, layer: str, infos: Infos) -> str:
        groups = infos["scales"].shape[0]
        return grouped(awq.BITS, infos["qweight"].shape[0] // groups, groups)

    def decode(self, layer: str, parts: Parts) -> QuantizedTensor:
        return AWQ().unpack(parts)


class ConfigGroups:
    """The config groups of compressed-tensors: which one a layer belongs to."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._format, self._groups = config.get("format"), list(config["config_groups"].values())

    def group(self, layer: str) -> tuple[str, Mapping[str, Any]]:
        """Format and scheme of the weights. Raises ValueError."""
        group = self._of(layer)
        return str(group.get("format") or self._format), group.get("weights") or {}

    def inputs(self, layer: str) -> Mapping[str, Any] | None:
        """How what arrives is quantized, None for not at all. Raises ValueError."""
        return self._of(layer).get("input_activations")

    def _of(self, layer: str) -> Mapping[str, Any]:
        """A target by name goes before one by class."""
        by_class = None
        for group in self._groups:
            for target in group.get("targets", ()):
                if target == layer or (target.startswith("re:") and re.match(target[3:], layer)):
                    return group
                if target in ("Linear", "Embedding") and by_class is None:
                    by_class = group
        if by_class is None:
            raise ValueError(f"no config group is for {layer}")
        return by_class

    def label(self, layer: str, infos: Infos) -> str:
        """What to call the type of a layer. Raises ValueError."""
        _, weights = self.group(layer)
        share = f"-g{weights.get('group_size')}" if "group" in str(weights.get("strategy")) else ""
        kind = "fp" if weights.get("type") == "float" else "int"
        return f"{kind}{weights.get('num_bits')}{share}{'' if weights.get('symmetric', True) else '-asym'}"


class _Packed(ConfigGroups):
    suffixes = (
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
        "weight_global_scale",
    )

    def shape(self, layer: str, infos: Infos, read: Callable[[str], Tensor]) -> tuple[int, int]:
        rows, words = infos["weight_packed"].shape
        if "weight_shape" not in infos:
            return rows, 2 * words  # two to a byte
        _, weights = self.group(layer)
        if weights.get("strategy") == "group":
            return rows, infos["weight_scale"].shape[1] * int(weights["group_size"])
        rows, cols = read("weight_shape").tolist()
        return rows, cols

    def decode(self, layer: str, parts: Parts) -> QuantizedTensor:
        form, weights = self.group(layer)
        if "weight_g_idx" in parts:
            raise ValueError("an order of columns (weight_g_idx), which compressed-tensors itself no longer reads")
        if form not in (compressed.PACKED, compressed.MXFP4, compressed.NVFP4):
            raise ValueError(f"the format {form!r} is not known")
        dense = True
        if form == compressed.PACKED:
            words, cols = parts["weight_packed"].shape[1], int(parts["weight_shape"][1])
            dense = compressed.is_dense(words, int(weights["num_bits"]), cols)
        return CompressedTensors(form, dense).unpack(parts, weights)


class _Plain(ConfigGroups):
    suffixes = ("weight_scale", "weight", "weight_zero_point", "input_scale", "input_zero_point")

    def shape(self, layer: str, infos: Infos, read: Callable[[str], Tensor]) -> tuple[int, int]:
        rows, cols = infos["weight"].shape
        return rows, cols

    def decode(self, layer: str, parts: Parts) -> QuantizedTensor:
        form, weights = self.group(layer)
        if form not in (compressed.INT, compressed.FLOAT, compressed.NAIVE):
            raise ValueError(f"the format {form!r} is not known")
        return CompressedTensors(form).unpack(parts, weights)


class _Native:
    def __init__(self, grids: Mapping[str, str], mark: str) -> None:
        self._grids = grids
        params = ("scale", "zero", "minimum", "g_idx", "levels", "columns", "values")
        rest = (native.SHAPE, *(native.PREFIX + each for each in params)) if mark == native.CODES else ()
        self.suffixes = (mark, *rest)

    def shape(self, layer: str, infos: Infos, read: Callable[[str], Tensor]) -> tuple[int, int]:
        if native.SHAPE in infos:
            rows, cols = read(native.SHAPE).tolist()
            return rows, cols
        rows, n_bytes = infos[native.BLOCKS].shape
        return rows, Native().cols(grid_named(self.label(layer, infos)), n_bytes)

    def label(self, layer: str, infos: Infos) -> str:
        if layer not in self._grids:
            raise ValueError(f"`grids` does not name {layer}")
        return str(self._grids[layer])

    def decode(self, layer: str, parts: Parts) -> QuantizedTensor:
        try:
            return Native().unpack(parts, grid_named(self.label(layer, {})))
        except RecipeError as error:
            raise ValueError(str(error)) from None
