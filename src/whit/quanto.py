"""The names that users of optimum-quanto know, with what Whit does behind them.

    from whit.quanto import Calibration, freeze, qint8, quantize

docs/quanto.md lists what is the same and what is not: activations are quantized at inputs of layers (and outputs of
norms) alone, embeddings and Conv1D are quantized, int4 has integer zero points and groups of 64.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from whit.calibration.ranges import minmax
from whit.grids.grid import Grid
from whit.live.calibrate import drop_unread, observe
from whit.live.checkpoint import check_buffers, fill_buffers
from whit.live.inputs import Inputs
from whit.live.quantize import freeze, twins_of
from whit.live.quantize import quantize as _quantize
from whit.live.report import Report
from whit.live.save import load, map_of, save_among, shape_as
from whit.live.types import (
    qfloat8,
    qfloat8_e4m3,
    qfloat8_e5m2,
    qint2,
    qint3,
    qint4,
    qint8,
)

qfloat8_e4m3fn = qfloat8_e4m3

__all__ = [
    "Calibration",
    "QuantizedModelForCausalLM",
    "freeze",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e5m2",
    "qint2",
    "qint3",
    "qint4",
    "qint8",
    "quantization_map",
    "quantize",
    "requantize",
]


def quantize(
    model: nn.Module,
    weights: Grid | str | None = None,
    activations: Grid | str | None = None,
    optimizer: Any = None,
    include: Any = None,
    exclude: Any = None,
) -> Report:
    """As `whit.quantize`, in the order of arguments of optimum-quanto; patterns may be a string or a list.

    optimizer  has no counterpart: Whit chooses scales by `method` (docs/live.md). Raises TypeError when it is given
    """
    if optimizer is not None:
        raise TypeError('optimizers of scales are not taken; whit.quantize(..., method="search") looks for scales.')
    return _quantize(model, weights, activations, include, exclude)


class Calibration:
    """Fixed scales for the activations of whatever quantized model runs while the context lasts.

    Scales are the largest values that were seen; `whit.calibrate` has better ways to choose them.
    """

    def __init__(self, momentum: float = 0.9, streamline: bool = True, debug: bool = False) -> None:
        """The arguments are taken and change nothing: nothing is averaged, and only inputs of layers are quantized."""
        self._seen: dict[nn.Module, None] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._seen.clear()
        self._stack.enter_context(register_module_forward_pre_hook(self._notice))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.close()
        inputs = {str(k): each for k, each in enumerate(self._seen) if isinstance(each, Inputs)}
        histograms = {name: each.observer for name, each in inputs.items() if each.observer is not None}
        observe(inputs.values(), False)
        if kind is None:
            drop_unread(inputs, histograms)
            for name, each in inputs.items():
                each.fix(minmax(histograms[name]))
        self._seen.clear()

    def _notice(self, module: nn.Module, args: Any) -> None:
        if module in self._seen:
            return
        # A model is called before its parts. Frozen layers never call their Inputs: they take codes from them.
        new = [each for each in module.modules() if each not in self._seen]
        self._seen |= dict.fromkeys(new)
        observe((each for each in new if isinstance(each, Inputs)), True)


def quantization_map(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Which module is quantized how; with a state_dict all that `requantize` needs."""
    return map_of(model)


def requantize(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    quantization_map: Mapping[str, Mapping[str, Any]],
    device: torch.device | None = None,
) -> None:
    """Give a float model of the same architecture (on the meta device, too) the quantized weights of another, in place.

    state_dict        of a frozen model; what is tied may be there under one of its names, as `save_model` of
                      safetensors writes it
    quantization_map  of that model
    device            of everything afterwards, None for where the state_dict is
    Raises ModelError or RuntimeError when they do not fit.
    """
    fill_buffers(model)
    shape_as(model, quantization_map)
    moved = {name: value if device is None else value.to(device) for name, value in state_dict.items()}
    first: dict[int, str] = {}
    own = model.state_dict(keep_vars=True)  # with the very tensors, which tied layers have in common
    for name, value in own.items():
        if name in moved:
            first.setdefault(id(value), name)
    moved |= {name: moved[first[id(each)]] for name, each in own.items() if name not in moved and id(each) in first}
    model.load_state_dict(moved, strict=True, assign=True)
    check_buffers(model)
    if device is not None:  # buffers that no state_dict has
        model.to(device)


class QuantizedModelForCausalLM:
    """A frozen causal model with the verbs of optimum-quanto's class; everything else is the model's own."""

    def __init__(self, model: nn.Module) -> None:
        """model  frozen, from transformers"""
        if not any(twin.frozen is not None for twin in twins_of(model)):
            raise ValueError("The model must be quantized: QuantizedModelForCausalLM.quantize(model, weights=qint4).")
        self._wrapped = model

    def __getattr__(self, name: str) -> Any:
        if "_wrapped" not in self.__dict__:  # copies are asked for names before they have anything
            raise AttributeError(name)
        return getattr(self.__dict__["_wrapped"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._wrapped)

    @classmethod
    def quantize(
        cls,
        model: nn.Module,
        weights: Grid | str | None = None,
        activations: Grid | str | None = None,
        optimizer: Any = None,
        include: Any = None,
        exclude: Any = None,
    ) -> QuantizedModelForCausalLM:
        """Quantize and freeze `model` in place."""
        quantize(model, weights, activations, optimizer, include, exclude)
        freeze(model)
        return cls(model)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it to a folder, as `whit.save` does, over an older model; whatever else is there stays."""
        save_among(self._wrapped, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> QuantizedModelForCausalLM:
        """From a folder of `save_pretrained`, or any other quantized model that Whit reads."""
        return cls(load(folder))
