"""What arrives at layers, quantized as the runtime of a compressed-tensors folder does it: decoded again at once.

    scale = max |x| / (range of the codes / 2), per token or per tensor;     x' = scale * round(x / scale), clamped

int8 has a range of 255, FP8 (E4M3) one of 896, rounded to its own values. A static scale comes from the file.
Source: docs/gpu.md; checked against compressed-tensors' own forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whit.checkpoints.quantized import WEIGHT, QuantizedTensors
from whit.checkpoints.schemes import ConfigGroups
from whit.errors import ModelError
from whit.models.model import Model

INPUT_SCALE = "input_scale"  # beside a layer's weight
INT_HIGH, INT_RANGE = 127.0, 255.0
FP8_HIGH = 448.0
SHRINK, N_SHRUNK = 0.85, 50  # ranges that are tried: the last is a three-thousandth of the first
TINY = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class InputScheme:
    """How the inputs of a layer are quantized.

    kind    "int" or "float", of 8 bits
    token   a scale per token, else one per tensor
    scale   the static one; None when it follows the inputs
    """

    kind: str
    token: bool
    scale: float | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x [..., cols] float32 as the layer will see it."""
        if self.scale is not None:
            scale = torch.tensor(self.scale)
        else:
            largest = x.abs().amax(-1, keepdim=True) if self.token else x.abs().amax()
            scale = largest / (INT_RANGE / 2 if self.kind == "int" else FP8_HIGH)
            scale = torch.where(scale == 0, TINY, scale)
        if self.kind == "int":
            return (x / scale).round().clamp(-INT_HIGH - 1, INT_HIGH) * scale
        return (x / scale).clamp(-FP8_HIGH, FP8_HIGH).to(torch.float8_e4m3fn).float() * scale


def fixed_scale(tokens: Tensor, kind: str) -> float:
    """The static scale for inputs like these.

    tokens  [n, cols] float32
    kind    "int" or "float"
    FP8 keeps its precision over 15 binades, so its range covers everything. For int8 the range is the one of least
    squared error, that of every token as a share of its size: a few tokens have inputs a thousand times as large as
    all others, and with a range for them the others would be nothing but zeros.
    """
    largest = tokens.abs().max().item()
    if largest == 0:
        return 1.0
    if kind == "float":
        return largest / FP8_HIGH
    sizes = tokens.square().sum(1).clamp(min=TINY)
    scales = [largest * SHRINK**n / INT_HIGH for n in range(N_SHRUNK)]
    errors = [
        ((InputScheme(kind, False, each).apply(tokens) - tokens).square().sum(1) / sizes).mean() for each in scales
    ]
    return scales[int(torch.stack(errors).argmin())]


def input_scheme(arguments: Mapping[str, Any] | None, scale: Tensor | None) -> InputScheme | None:
    """The scheme that a config group describes, None for floats.

    scale  the layer's stored `input_scale`, if there is one
    Raises ModelError for one that is not computed here.
    """
    if not arguments:
        return None
    kind, strategy, bits = arguments.get("type"), arguments.get("strategy"), arguments.get("num_bits")
    if kind not in ("int", "float") or strategy not in ("token", "tensor") or bits != 8:
        raise ModelError(f"activations of {bits} bits, {kind} per {strategy}, are not computed; 8 bits per token are.")
    if not arguments.get("symmetric", True):
        raise ModelError("activations with zero points are not computed; symmetric ones are.")
    if arguments.get("dynamic"):
        return InputScheme(kind, strategy == "token")
    if scale is None or scale.numel() != 1:
        raise ModelError("activations are quantized with a fixed scale, but the folder has none (input_scale).")
    return InputScheme(kind, False, scale.float().item())


def input_schemes(model: Model) -> dict[str, InputScheme]:
    """Layers (names on disk) whose inputs are quantized. Raises ModelError as `input_scheme` does."""
    if model.quantization.get("quant_method") != "compressed-tensors" or not isinstance(
        model.tensors, QuantizedTensors
    ):
        return {}
    groups, found = ConfigGroups(model.quantization), {}
    for name in model.tensors.names():
        if not model.tensors.is_quantized(name):
            continue
        layer = name.removesuffix(WEIGHT)
        scheme = input_scheme(groups.inputs(layer), model.tensors.stored(name, INPUT_SCALE))
        if scheme is not None:
            found[layer] = scheme
    return found


def quantize_inputs(module: nn.Module, schemes: Mapping[str, InputScheme]) -> None:
    """From now on the named submodules see their inputs quantized. Raises ModelError for a name that is not there."""
    for name, scheme in schemes.items():
        try:
            layer = module.get_submodule(name)
        except AttributeError:
            raise ModelError(f"{name} has quantized inputs, but transformers has no such layer.") from None
        layer.register_forward_pre_hook(_hook(scheme))


def _hook(scheme: InputScheme) -> Any:
    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return scheme.apply(inputs[0]), *inputs[1:]

    return before
