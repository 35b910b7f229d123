"""The tensors of a quantized file under scales that move: decoded, given gradients, written back.

Codes and integer sub-scales stay. What moves are the float scales and minima of every block and the vectors that stay
float32, norms and biases: value = start * (1 + u), u trained by Adam. A matrix is a sum over its float parameters of
the parameter times a basis that does not change (Adaptive.bases), so

    dL/dparameter = sum over the block of dL/dW * basis.

The parameters are rounded to what the file stores whenever they are used, u is not: small steps add up.
Source: arXiv 2407.11062 (EfficientQAT, training of step sizes alone); arXiv 1412.6980 (Adam).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from whit.checkpoints.gguf import GGUFFile
from whit.grids.grid import Adaptive
from whit.grids.quantized import QuantizedTensor
from whit.layouts.ggml import GGML_TYPES

BETAS, EPSILON = (0.9, 0.99), 1e-12
FARTHEST = 0.1  # |u|
REFERENCE_BITS = 4.5  # at which the learning rate is what it is called; it falls with the step of the grid
STORED = (torch.float16, torch.float32)
WHOLE = "values"  # the parameter of a vector


@dataclass
class _Moving:
    """One parameter of one tensor.

    start     [rows, spans] float32 (or the whole vector)
    rate      learning rate, relative to that of REFERENCE_BITS
    u         relative change
    gradient  dL/du, summed
    """

    start: Tensor
    rate: float
    u: Tensor = field(init=False)
    gradient: Tensor = field(init=False)
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.u, self.gradient, self.first, self.second = (torch.zeros_like(self.start) for _ in range(4))

    @property
    def value(self) -> Tensor:
        return self.start * (1 + self.u)


class Student:
    """What moves in one file.

    n_moving  how many numbers
    """

    def __init__(self, file: GGUFFile) -> None:
        """Tensors of types that are not decoded here, and of plain floats but for vectors, stay as they are."""
        self._file = file
        self._moving: dict[str, dict[str, _Moving]] = {}
        self._steps = 0
        n_weights = 0
        for name in file.names():
            info = file.info(name)
            n_weights += torch.Size(info.shape).numel()
            kind = GGML_TYPES.get(info.dtype)
            if kind is not None and kind.fields:
                params = self._stored(name).params
                bases = [key for key, value in params.items() if value.dtype in STORED]
                rate = 2.0 ** (REFERENCE_BITS - kind.grid.bits_per_weight(info.shape[-1]))
                self._moving[name] = {key: _Moving(params[key].float(), rate) for key in bases}
        rate = 2.0 ** (REFERENCE_BITS - 8 * file.n_bytes / n_weights)
        for name in file.names():
            info = file.info(name)
            if info.dtype == "F32" and len(info.shape) == 1 and name.rsplit(".", 1)[-1] in ("weight", "bias"):
                self._moving[name] = {WHOLE: _Moving(file.read(name), rate)}
        self._moving = {name: parameters for name, parameters in self._moving.items() if parameters}

    @property
    def n_moving(self) -> int:
        """How many numbers move."""
        return sum(each.u.numel() for parameters in self._moving.values() for each in parameters.values())

    def moves(self, name: str) -> bool:
        """Whether anything in a tensor does."""
        return name in self._moving

    def read(self, name: str) -> Tensor:
        """A tensor as a file would hold it now, decoded to float32."""
        parameters = self._moving.get(name)
        if parameters is None:
            return self._file.read(name)
        if WHOLE in parameters:
            return parameters[WHOLE].value
        return self._moved(name).dequantize().view(self._file.info(name).shape)

    def note(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of the loss by a decoded tensor, of its shape."""
        parameters = self._moving[name]
        if WHOLE in parameters:
            parameters[WHOLE].gradient += gradient * parameters[WHOLE].start
            return
        stored = self._stored(name)
        bases = cast(Adaptive, stored.grid).bases(stored.codes, stored.params)
        for key, moving in parameters.items():
            rows, spans = moving.start.shape
            sums = (gradient.reshape(stored.shape) * bases[key]).view(rows, spans, -1).sum(-1)
            moving.gradient += sums * moving.start

    def step(self, rate: float) -> None:
        """One step of Adam with the gradients noted since the last one."""
        self._steps += 1
        corrections = [1 - beta**self._steps for beta in BETAS]
        for parameters in self._moving.values():
            for each in parameters.values():
                each.first.lerp_(each.gradient, 1 - BETAS[0])
                each.second.lerp_(each.gradient.square(), 1 - BETAS[1])
                size = (each.second / corrections[1]).sqrt_().add_(EPSILON)
                each.u -= rate * each.rate * (each.first / corrections[0]) / size
                each.u.clamp_(-FARTHEST, FARTHEST)
                each.gradient.zero_()

    def state(self) -> dict[tuple[str, str], Tensor]:
        """A copy of all changes."""
        return {(name, key): each.u.clone() for name, key, each in self._all()}

    def restore(self, state: dict[tuple[str, str], Tensor]) -> None:
        """Back to such a copy."""
        for name, key, each in self._all():
            each.u.copy_(state[name, key])

    def packed(self) -> Iterator[tuple[str, Tensor]]:
        """Name and flat bytes of every tensor in which something moved."""
        for name, parameters in self._moving.items():
            if WHOLE in parameters:
                yield name, parameters[WHOLE].value.contiguous().view(torch.uint8)
            else:
                yield name, GGML_TYPES[self._file.info(name).dtype].pack(self._moved(name))

    def _all(self) -> Iterator[tuple[str, str, _Moving]]:
        for name, parameters in self._moving.items():
            for key, each in parameters.items():
                yield name, key, each

    def _stored(self, name: str) -> QuantizedTensor:
        *outer, cols = self._file.info(name).shape
        kind = GGML_TYPES[self._file.info(name).dtype]
        return kind.unpack(self._file.raw(name), (torch.Size(outer).numel(), cols))

    def _moved(self, name: str) -> QuantizedTensor:
        stored = self._stored(name)
        moved = {key: each.value.to(stored.params[key].dtype) for key, each in self._moving[name].items()}
        return QuantizedTensor(stored.grid, stored.shape, stored.codes, {**stored.params, **moved})
