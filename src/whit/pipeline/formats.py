"""What each kind of folder holds and says of itself: layouts, and the quantization_config in config.json.

Source: docs/formats.md; the loaders of transformers and vLLM.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from torch import Tensor

from whit.grids.grid import Grid, Spec
from whit.grids.levels import Integers
from whit.grids.named import grid_name
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import Offset, PerChannel, PerGroup, Scaled
from whit.layouts.awq import AWQ
from whit.layouts.compressed import MXFP4, NVFP4, CompressedTensors, format_of
from whit.layouts.gptq import GPTQ
from whit.layouts.native import Native
from whit.recipes import folders

INPUTS: dict[str, dict[str, Any]] = {
    folders.INT8_TOKENS: {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    folders.FP8_TOKENS: {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
    folders.INT8_FIXED: {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
    folders.FP8_FIXED: {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
}


class Layout(Protocol):
    """Matrices to stored tensors, by suffix of their names."""

    def refuses(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why a matrix has no place here; None when it has."""
        ...

    def schema(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Spec]:
        """Shape and dtype of every stored tensor."""
        ...

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors."""
        ...


@dataclass(frozen=True)
class Said:
    """What config.json is made from.

    grids        layer -> grid, in order
    floats       layers with a matrix that stays in float
    heads        the names of the head, there or not
    activations  of the recipe
    """

    grids: Mapping[str, Grid]
    floats: Sequence[str]
    heads: tuple[str, ...]
    activations: str


@dataclass(frozen=True)
class Format:
    """One kind of folder.

    make       the layout of a matrix on a grid, by what `layout` takes
    config     the content of quantization_config
    one_size   whether all layers must have the same group size
    linear     whether only nn.Linear can be quantized, not transformers' Conv1D
    """

    make: Callable[[Grid, bool, bool], Layout]
    config: Callable[[Said], dict[str, Any]]
    one_size: bool = False
    linear: bool = False

    def layout(self, grid: Grid, activations: bool = False, zero_points: bool = True) -> Layout:
        """The layout of a matrix on a grid.

        activations  whether they are quantized as well
        zero_points  whether any matrix of the folder has some, which decides how they are stored, not where
        """
        return self.make(grid, activations, zero_points)


def _gptq(grid: Grid, activations: bool, zero_points: bool) -> GPTQ:
    """Version 1, which every reader understands, where it can be; it cannot hold a zero point of 0."""
    return GPTQ(2 if zero_points else 1)


def _gptq_config(said: Said) -> dict[str, Any]:
    numbers = {layer: _numbers(grid) for layer, grid in said.grids.items()}
    bits, size, symmetric = Counter(numbers.values()).most_common(1)[0][0]
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq_v2" if any(not each[2] for each in numbers.values()) else "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "meta": {"quantizer": [f"whit:{version('whit')}"]},
    }
    others = {layer: each for layer, each in numbers.items() if each != (bits, size, symmetric)}
    dynamic: dict[str, Any] = {
        f"+:^{re.escape(layer)}$": {"bits": each[0], "group_size": each[1], "sym": each[2]}
        for layer, each in others.items()
    }
    dynamic |= {f"-:^{re.escape(layer)}$": {} for layer in said.floats if layer not in said.heads}
    return {**config, "dynamic": dynamic} if dynamic else config


def _awq_config(said: Said) -> dict[str, Any]:
    sizes = {_numbers(grid)[1] for grid in said.grids.values()}
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": sizes.pop() if sizes else 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [*said.heads, *(layer for layer in said.floats if layer not in said.heads)],
    }


def _compressed(grid: Grid, activations: bool, zero_points: bool = True) -> CompressedTensors:
    return CompressedTensors(format_of(grid, activations))


def _compressed_config(said: Said) -> dict[str, Any]:
    kinds: dict[Grid, list[str]] = {}
    for layer, grid in said.grids.items():
        kinds.setdefault(grid, []).append(layer)
    groups: dict[str, Any] = {}
    for n, (grid, layers) in enumerate(kinds.items()):
        groups[f"group_{n}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else layers,
            "weights": _weights(grid),
            "input_activations": INPUTS.get(said.activations),
            "output_activations": None,
            "format": _compressed(grid, bool(said.activations)).format,
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": [*said.heads, *(layer for layer in said.floats if layer not in said.heads)],
    }


def _weights(grid: Grid) -> dict[str, Any]:
    assert isinstance(grid, Scaled)
    found = {
        "num_bits": 4 if format_of(grid, False) in (MXFP4, NVFP4) else grid.levels.bits,
        "type": "int" if isinstance(grid.levels, Integers) else "float",
        "symmetric": grid.offset is Offset.NONE,
        "dynamic": False,
        "group_size": None,
        "strategy": "channel" if isinstance(grid.scheme, PerChannel) else "tensor",
    }
    if not isinstance(grid.scheme, PerGroup):
        return found
    if format_of(grid, False) != NVFP4:
        return found | {"strategy": "group", "group_size": grid.scheme.size}
    fp8 = "torch.float8_e4m3fn"
    return found | {"strategy": "tensor_group", "group_size": grid.scheme.size, "scale_dtype": fp8, "zp_dtype": fp8}


def _whit_config(said: Said) -> dict[str, Any]:
    return {
        "quant_method": "whit",
        "version": 1,
        "grids": {layer: grid_name(grid) for layer, grid in said.grids.items()},
    }


def has_zero_points(grid: Grid) -> bool:
    """Whether a grid stores zero points beside its scales."""
    return isinstance(grid, Scaled) and grid.offset is Offset.ZERO_POINT


def _numbers(grid: Grid) -> tuple[int, int, bool]:
    """Bits, group size (-1 per channel) and whether it is symmetric."""
    assert isinstance(grid, Scaled)
    size = grid.scheme.size if isinstance(grid.scheme, PerGroup) else -1
    return grid.levels.bits, size, grid.offset is Offset.NONE


FOLDERS: dict[str, Format] = {
    folders.GPTQ: Format(_gptq, _gptq_config, one_size=True),
    folders.AWQ: Format(lambda *_: AWQ(), _awq_config, one_size=True, linear=True),
    folders.COMPRESSED: Format(_compressed, _compressed_config, linear=True),
    folders.WHIT: Format(lambda *_: Native(), _whit_config),
    folders.FLOAT: Format(lambda *_: Native(), _whit_config),
}
