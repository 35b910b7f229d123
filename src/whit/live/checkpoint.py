"""Live models from every file that Whit reads: the codes in the file become the codes of the modules.

GPTQ, AWQ, compressed-tensors and Whit folders, GGUF files. What a runtime of such a file would decode is what these
modules multiply with, to the last bit. Layers that the file has in float stay torch's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from whit.checkpoints.quantized import WEIGHT, QuantizedTensors
from whit.errors import ModelError
from whit.grids.quantized import QuantizedTensor
from whit.live.attention import attend_natively
from whit.live.experts import QExpert, QExperts
from whit.live.quantize import swap, twin_of
from whit.live.stored import Frozen, settle
from whit.live.twin import Ties, Twin
from whit.models.activations import input_hook, input_schemes
from whit.models.architecture import head_name
from whit.models.links import Links
from whit.models.model import Model
from whit.models.open import open_model
from whit.models.skeleton import config_and_class, config_and_named_class, quiet
from whit.models.stream import make_buffers
from whit.pipeline.folder import rows_of
from whit.pipeline.quantize import model_view
from whit.pipeline.stored import Stored, joined, stored_of


def empty_model(model: Model, named: bool = False) -> nn.Module:
    """transformers' module for a model, in evaluation mode, its parameters without memory and its buffers made.

    named  whether it is of the class that the configuration names: else it is the causal one
    Raises UnknownArchitectureError and ModelError as `load_module` does.
    """
    config, cls = config_and_named_class(model) if named else config_and_class(model)
    with quiet(), torch.device("meta"):
        module = cls._from_config(config)
        module.tie_weights()
    fill_buffers(module)
    return module.eval().requires_grad_(False)


def fill_buffers(model: nn.Module) -> None:
    """Make the buffers of transformers' models in `model` that are on the meta device, such as rotary frequencies.

    No file has them, and they must be there before layers are replaced and weights are read: transformers makes them
    together with new weights.
    """
    parts = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    for part in reversed(parts):  # models inside of others know their own buffers
        make_buffers(part, part)


def check_buffers(model: nn.Module) -> None:
    """Raise ModelError when a buffer is still on the meta device: nothing could be computed with it."""
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if empty:
        raise ModelError(
            f"{type(model).__name__}: {len(empty)} buffers are on the meta device and in no file ({empty[0]} is one). "
            "Make the model on the device where it shall run."
        )


def live_checkpoint(path: str | Path, dtype: torch.dtype) -> nn.Module:
    """A live model from anything that `open_model` takes.

    dtype  of what is not quantized
    Raises ModelError as `open_model` does, and for files whose parts are on different grids.
    """
    return live_model(open_model(path), dtype)


def live_model(model: Model, dtype: torch.dtype) -> nn.Module:
    """As `live_checkpoint`, of a model that is open."""
    module, codes = empty_model(model), _Codes(model)
    originals = list(module.parameters())  # `names` knows them by identity, which lasts as long as they do
    names, schemes = _names(module, codes), input_schemes(model)
    made: dict[int, nn.Module] = {}
    ties = Ties()
    for name, layer in list(module.named_modules()):
        twin = _twin(name, layer, codes, names)
        if twin is None:
            continue
        made[id(layer)] = twin
        for key, each in matrices_of(name, twin):
            home = names.get(id(each._parameters["weight"]), key[0])
            ties.freeze(each, lambda home=home, key=key: Frozen.of(codes.of(home, key[1])))  # type: ignore[misc]
            scheme = schemes.get(codes.layer(*key))
            if scheme is not None:
                each.register_forward_pre_hook(input_hook(scheme))
    swap(module, made)
    settle(module)
    attend_natively(module)
    filled: dict[int, nn.Parameter] = {}  # by the identity of originals, which are still there
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if id(parameter) not in filled:
            home = names.get(id(parameter), without_inner(name))
            values = codes.links.read(home, tuple(parameter.shape)).to(dtype)
            filled[id(parameter)] = nn.Parameter(values, requires_grad=False)
        parent, _, own = name.rpartition(".")
        module.get_submodule(parent)._parameters[own] = filled[id(parameter)]
    del originals
    for part in module.modules():
        if isinstance(part, Twin):
            part.to(dtype)
    return module


class _Codes:
    """The quantized matrices of a model by the names of transformers' parameters."""

    def __init__(self, model: Model) -> None:
        self._model, self.links = model, Links(model_view(model))
        self._stored: Stored = stored_of(model)
        self.head = head_name(model.config)
        self._gguf: tuple[str, list[QuantizedTensor] | None] = ("", None)

    def there(self, parameter: str) -> bool:
        """Whether all of a parameter is quantized in the file."""
        homes = [name for parts in self.links.homes(parameter) for name in parts]
        if any(self.links.stacked(name) for name in homes):  # experts in one tensor on disk: they are opened as floats
            return False
        return bool(homes) and all(self._is_quantized(name) for name in homes)

    def of(self, parameter: str, expert: int) -> QuantizedTensor:
        """One matrix of a parameter, [out, in]. Raises RecipeError when its parts are on different grids."""
        parts = [self._read(name) for name in self.links.homes(parameter)[expert]]
        if any(each.grid != parts[0].grid for each in parts):
            raise ModelError(f"{parameter}: its parts are on different grids; convert the file to f16 first.")
        return joined(parts)

    def layer(self, parameter: str, expert: int) -> str:
        """The name on disk of the layer that (the first part of) a matrix is in, empty for none."""
        homes = self.links.homes(parameter)
        return homes[expert][0].removesuffix(WEIGHT) if homes else ""

    def _is_quantized(self, name: str) -> bool:
        tensors = self._model.tensors
        if isinstance(tensors, QuantizedTensors):
            return tensors.is_quantized(name)
        return self._matrices(name) is not None

    def _read(self, name: str) -> QuantizedTensor:
        tensors = self._model.tensors
        if isinstance(tensors, QuantizedTensors):
            return tensors.quantized(name)
        found = self._matrices(name)
        assert found is not None
        return rows_of(found[self.links.source(name)[1]], *self.links.disk_rows(name))

    def _matrices(self, name: str) -> list[QuantizedTensor] | None:
        gguf, _ = self.links.source(name)
        if self._model.gguf_tensors is None:
            return None
        if self._gguf[0] != gguf:
            self._gguf = gguf, self._stored.matrices(gguf)
        return self._gguf[1]


def _names(module: nn.Module, codes: _Codes) -> dict[int, str]:
    """Parameters (by identity) and a name of each that is in the file: tied ones are there once."""
    found: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if codes.links.homes(name):
            found.setdefault(id(parameter), name)
    head = module.get_output_embeddings()  # type: ignore[operator]
    if head is not None:  # whatever its name on disk
        found.setdefault(id(head.weight), codes.head)
    return found


def _twin(name: str, layer: nn.Module, codes: _Codes, names: Mapping[int, str]) -> nn.Module | None:
    stacks = [key for key, value in layer._parameters.items() if value is not None and value.dim() == 3]
    stacks = [key for key in stacks if codes.there(f"{name}.{key}")]
    if stacks:
        return QExperts(layer, {key: codes.of(f"{name}.{key}", 0).grid for key in stacks})
    weight = layer._parameters.get("weight")
    home = names.get(id(weight), "")
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not codes.there(home):
        return None
    found = twin_of(name, layer, codes.of(home, 0).grid, None)
    return None if isinstance(found, str) else found[0]


def matrices_of(name: str, twin: nn.Module) -> list[tuple[tuple[str, int], Twin]]:
    """Which matrix of which parameter every twin in a replaced module has."""
    if isinstance(twin, QExperts):
        return [
            ((f"{name}.{key}", index), each)
            for key, stack in twin.stacks.items()
            for index, each in enumerate(stack.children())
            if isinstance(each, QExpert)
        ]
    return [((f"{name}.weight", 0), each) for each in [twin] if isinstance(each, Twin)]


def without_inner(name: str) -> str:
    """The name that a parameter of an expert block had before the block was wrapped."""
    return name.replace(".inner.", ".")
