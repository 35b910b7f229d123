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
from torch.overrides import TorchFunctionMode

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
    """From now on the named submodules see their inputs quantized.

    A layer that is a slice of a three-dimensional parameter, as experts are, has no module of its own: all products
    with that parameter are given quantized inputs. Raises ModelError for a name that is not there, and for experts of
    a block whose schemes differ.
    """
    of_experts: dict[str, set[InputScheme]] = {}
    for name, scheme in schemes.items():
        try:
            module.get_submodule(name).register_forward_pre_hook(input_hook(scheme))
        except AttributeError:
            of_experts.setdefault(_nearest(module, name), set()).add(scheme)
    for home, found in of_experts.items():
        block = module.get_submodule(home)
        stacks = [
            part
            for part in block.modules()
            if any(each.dim() == 3 for each in part._parameters.values() if each is not None)
        ]
        if len(stacks) != 1 or not home:
            raise ModelError(f"a layer in {home or 'the model'} has quantized inputs, but transformers has none there.")
        if len(found) != 1:
            raise ModelError(f"{home}: the inputs of its experts are quantized in {len(found)} ways; one is computed.")
        _round_products(stacks[0], next(iter(found)))


def _nearest(module: nn.Module, name: str) -> str:
    """The longest part of a name that is a module."""
    there = {each for each, _ in module.named_modules()}
    parts = name.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in there), "")


def _stacks(module: nn.Module) -> list[Tensor]:
    """A module's own three-dimensional parameters."""
    return [each for each in module._parameters.values() if each is not None and each.dim() == 3]


class _Rounded(TorchFunctionMode):
    """Inputs of products with some parameters are quantized."""

    def __init__(self, stack: nn.Module, scheme: InputScheme) -> None:
        super().__init__()
        self._stack, self._scheme = stack, scheme

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
        if func in products and len(args) > 1 and self._is_expert(args[1]):
            args = (self._scheme.apply(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def _is_expert(self, weight: Tensor) -> bool:
        at = weight.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == at for each in _stacks(self._stack))


def _round_products(stack: nn.Module, scheme: InputScheme) -> None:
    modes: list[_Rounded] = []

    def before(*_: Any) -> None:
        modes.append(_Rounded(stack, scheme))
        modes[-1].__enter__()

    def after(*_: Any) -> None:
        modes.pop().__exit__(None, None, None)

    stack.register_forward_pre_hook(before)
    stack.register_forward_hook(after, always_call=True)


def input_hook(scheme: InputScheme) -> Any:
    """A forward pre-hook that quantizes a module's first argument."""

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return scheme.apply(inputs[0]), *inputs[1:]

    return before
