"""Tensors of a file format inside a torch module: they move between devices and are never cast.

`module.to(torch.bfloat16)` casts every buffer of a float type. A scale that is half precision in the file, and that
codes were chosen for, must stay what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from whit.grids.grid import Grid, Params
from whit.grids.quantized import QuantizedTensor
from whit.kernels.packed import Packed, pack, unpack
from whit.kernels.pages import together

BATCH = 1 << 26  # bytes of codes that are there twice while they are moved


class Stored(nn.Module):
    """Named tensors, kept as they are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """tensors  by name; they are not copied."""
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)

    @property
    def tensors(self) -> Params:
        """By name."""
        return {name: value for name, value in self._buffers.items() if value is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, value in self.tensors.items():
            device = fn(torch.empty(0, device=value.device)).device
            if device != value.device:
                moved = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
                self._buffers[name] = moved
        self._changed()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Tensors of another type, which torch would assign as they are, are errors: kernels read by the grid's."""
        own, (_, prefix, *_, errors) = self.tensors, args
        super()._load_from_state_dict(*args)
        for name, value in own.items():
            found = self._buffers[name]
            if found is not None and found.dtype != value.dtype:
                self._buffers[name] = value
                errors.append(f"{prefix}{name} must be {value.dtype}, found {found.dtype}")
        self._changed()

    def _changed(self) -> None:
        """Other tensors have come in the place of these."""


class Frozen(Stored):
    """A matrix as codes.

    packed  what the kernels read
    """

    def __init__(self, packed: Packed) -> None:
        """packed  its buffers become this module's."""
        super().__init__(packed.buffers)
        self.packed = packed
        self._changed()

    @classmethod
    def of(cls, quantized: QuantizedTensor) -> Frozen:
        """From codes and parameters, which may have been trained."""
        device = quantized.codes.device  # codes are packed by the processor
        params = {name: value.detach().cpu() for name, value in quantized.params.items()}
        packed = pack(replace(quantized, codes=quantized.codes.cpu(), params=params))
        return cls(replace(packed, buffers={name: value.to(device) for name, value in packed.buffers.items()}))

    @property
    def grid(self) -> Grid:
        """The grid that it is on."""
        return self.packed.grid

    @property
    def quantized(self) -> QuantizedTensor:
        """Codes and parameters, as they were."""
        return unpack(self.packed)

    def extra_repr(self) -> str:
        """Shape, and bytes."""
        rows, cols = self.packed.shape
        return f"{rows} x {cols}, {sum(each.nbytes for each in self.tensors.values())} bytes"

    def _changed(self) -> None:
        # torch's own dictionary, so that what `torch.func.functional_call` puts there for a call is multiplied with; a
        # new `Packed`, because one that was multiplied with holds on to the tensors that were there.
        buffers = cast(dict[str, Tensor], self._buffers)
        self.packed = Packed(self.packed.grid, self.packed.shape, buffers)


def settle(model: nn.Module) -> None:
    """Put the codes of all frozen matrices of a model, which are read for every token, on large pages, in place.

    Called once when all are there. Those on other devices stay as they are.
    """
    batch: list[tuple[Frozen, str]] = []
    size = 0
    for frozen in [module for module in model.modules() if isinstance(module, Frozen)]:
        for name, value in frozen.tensors.items():
            if value.device.type == "cpu":
                batch.append((frozen, name))
                size += value.nbytes
        if size >= BATCH:
            _move(batch)
            batch, size = [], 0
    _move(batch)


def _move(batch: list[tuple[Frozen, str]]) -> None:
    moved = together([frozen.tensors[name] for frozen, name in batch])
    for (frozen, name), value in zip(batch, moved, strict=True):
        frozen._buffers[name] = value
        frozen._changed()
