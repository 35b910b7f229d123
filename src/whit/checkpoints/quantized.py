"""Folders of quantized safetensors, seen as the float tensors that they stand for.

A linear layer of such a folder is several stored tensors; here it is one, `NAME.weight`, decoded to float32 when it is
read, with its codes to be had as well. How layers are stored is the business of schemes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

from torch import Tensor

from whit.checkpoints.schemes import Scheme, schemes
from whit.checkpoints.source import TensorInfo, TensorSource
from whit.checkpoints.stacked import METHOD, StackedTensors
from whit.errors import BrokenFileError, RecipeError
from whit.grids.quantized import QuantizedTensor

CONFIG = "quantization_config"
WEIGHT = ".weight"
Decode = Callable[[str, Mapping[str, Tensor]], Tensor | None]  # layer, its stored tensors -> [out, in] float32
BROKEN = (ValueError, KeyError, IndexError, ZeroDivisionError, RuntimeError, RecipeError)


def decoded(
    source: TensorSource, config: Mapping[str, Any], turned: Callable[[str], bool] = lambda name: False
) -> QuantizedTensors | StackedTensors:
    """A folder's tensors as floats, from the content of quantization_config; `turned` as QuantizedTensors takes it.

    Raises ModelError for a format that is not read.
    """
    return StackedTensors(source) if config.get("quant_method") == METHOD else QuantizedTensors(source, config, turned)


class QuantizedTensors:
    """A folder's tensors with quantized layers decoded."""

    def __init__(
        self, source: TensorSource, config: Mapping[str, Any], turned: Callable[[str], bool] = lambda name: False
    ) -> None:
        """From the content of quantization_config.

        turned  whether the model has the weight of this name as [in, out], as transformers' Conv1D does
        Raises ModelError for a format that is not read.
        """
        self._source, self._turned = source, turned
        self._decode: Decode | None = None
        self._layers: dict[str, tuple[Scheme, dict[str, str]]] = {}  # weight -> scheme, suffix -> stored name
        names = list(source.names())
        there, owner = set(names), dict[str, str]()
        for scheme in schemes(config):
            for name in names:
                layer, _, suffix = name.rpartition(".")
                parts = {each: f"{layer}.{each}" for each in scheme.suffixes if f"{layer}.{each}" in there}
                if suffix == scheme.suffixes[0] and layer + WEIGHT not in self._layers:
                    self._layers[layer + WEIGHT] = scheme, parts
                    owner |= dict.fromkeys(parts.values(), layer + WEIGHT)
        self._names = list(dict.fromkeys(owner.get(name, name) for name in names))

    def names(self) -> Sequence[str]:
        """Floats and decoded weights, in file order."""
        return self._names

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is stored quantized."""
        return name in self._layers

    def info(self, name: str) -> TensorInfo:
        """Shape of the weight; type and bytes of all that it is stored as. Raises BrokenFileError."""
        if name not in self._layers:
            return self._source.info(name)
        scheme, parts = self._layers[name]
        layer, infos = name.removesuffix(WEIGHT), {suffix: self._source.info(each) for suffix, each in parts.items()}
        try:
            rows, cols = scheme.shape(layer, infos, lambda suffix: self._source.read(parts[suffix]))
            label = scheme.label(layer, infos)
        except BROKEN as error:
            raise _broken(name, error) from None
        shape = (cols, rows) if self._turned(name) else (rows, cols)
        return TensorInfo(name, shape, label, sum(each.n_bytes for each in infos.values()))

    def read(self, name: str) -> Tensor:
        """A float as stored, a quantized weight decoded to float32. Raises BrokenFileError when it cannot be."""
        if name not in self._layers:
            return self._source.read(name)
        W = self._decoded_otherwise(name)
        W = self.quantized(name).dequantize() if W is None else W
        return W.T.contiguous() if self._turned(name) else W

    def with_decoder(self, decode: Decode) -> QuantizedTensors:
        """The same folder, read with another decoder."""
        other = copy(self)
        other._decode = decode
        return other

    def stored(self, name: str, suffix: str) -> Tensor | None:
        """One of the tensors that a quantized weight is stored as, None when it has no such part."""
        _, parts = self._layers[name]
        return self._source.read(parts[suffix]) if suffix in parts else None

    def quantized(self, name: str) -> QuantizedTensor:
        """The codes of a quantized weight, [out, in]. Raises BrokenFileError when its tensors do not fit together."""
        scheme, _ = self._layers[name]
        try:
            return scheme.decode(name.removesuffix(WEIGHT), self._parts(name))
        except BROKEN as error:
            raise _broken(name, error) from None

    def _decoded_otherwise(self, name: str) -> Tensor | None:
        if self._decode is None:
            return None
        try:
            return self._decode(name.removesuffix(WEIGHT), self._parts(name))
        except BROKEN as error:
            raise _broken(name, error) from None

    def _parts(self, name: str) -> dict[str, Tensor]:
        return {suffix: self._source.read(each) for suffix, each in self._layers[name][1].items()}


def _broken(name: str, error: Exception) -> BrokenFileError:
    return BrokenFileError(f"{name}: its stored tensors cannot be decoded ({error}).")
