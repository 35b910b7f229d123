"""The tensors of a quantized file under scales that move: decoded, given gradients, written back.

Codes and integer sub-scales stay. What moves are the float scales and minima of every block and the vectors that stay
float32, norms and biases: value = start * (1 + u), u trained by Adam. A matrix's u is that of the block and that of
its row: what blocks have in common is learned faster, and less of it is noise. A matrix is a sum over its float
parameters of the parameter times a basis that does not change (Adaptive.bases), so

    dL/dparameter = sum over the block of dL/dW * basis.

The parameters are rounded to what the file stores whenever they are used, u is not: small steps add up.
Source: arXiv 2407.11062 (EfficientQAT, training of step sizes alone); arXiv 1412.6980 (Adam).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from whit.grids.grid import Adaptive
from whit.grids.quantized import QuantizedTensor
from whit.pipeline.stored import Stored, joined

BETAS, EPSILON = (0.9, 0.99), 1e-12
FARTHEST = 0.1  # |u|
REFERENCE_BITS = 4.5  # at which the learning rate is what it is called; it falls with the step of the grid
STORED = (torch.float16, torch.bfloat16, torch.float32)
SPANS, ROWS, VECTORS = 0.1, 1.0, 1.0  # rates of blocks' own changes, of whole rows', of norms' and biases'
WHOLE = "values"  # the parameter of a vector


class _Change:
    """Relative changes u of one shape, and Adam's two moments of their gradients."""

    def __init__(self, shape: torch.Size) -> None:
        self.u, self._first, self._second = (torch.zeros(shape) for _ in range(3))

    def step(self, gradient: Tensor, rate: float, n: int) -> None:
        """The n-th step."""
        self._first.lerp_(gradient, 1 - BETAS[0])
        self._second.lerp_(gradient.square(), 1 - BETAS[1])
        size = (self._second / (1 - BETAS[1] ** n)).sqrt_().add_(EPSILON)
        self.u -= rate / (1 - BETAS[0] ** n) * self._first / size
        self.u.clamp_(-FARTHEST, FARTHEST)


class _Moving:
    """One parameter of one tensor.

    start     [rows, spans] float32 (or the whole vector)
    gradient  dL/du, summed
    """

    def __init__(self, start: Tensor, rate: float) -> None:
        """rate  learning rate, relative to that of REFERENCE_BITS"""
        self.start, self.gradient = start, torch.zeros_like(start)
        self._rate = rate
        self.own = _Change(start.shape)
        self.row = _Change(start[:, :1].shape) if start.dim() == 2 else None

    @property
    def value(self) -> Tensor:
        """The parameter as it is now, not rounded."""
        change = self.own.u if self.row is None else self.own.u + self.row.u
        return self.start * (1 + change)

    def step(self, rate: float, n: int) -> None:
        """The n-th step with the gradients noted since the last one."""
        if self.row is None:
            self.own.step(self.gradient, rate * self._rate * VECTORS, n)
        else:
            self.own.step(self.gradient, rate * self._rate * SPANS, n)
            self.row.step(self.gradient.sum(1, keepdim=True), rate * self._rate * ROWS, n)
        self.gradient.zero_()

    def changes(self) -> list[Tensor]:
        """What `Student.state` copies."""
        return [self.own.u] if self.row is None else [self.own.u, self.row.u]


class Student:
    """What moves in one file.

    n_moving  how many numbers
    """

    def __init__(self, stored: Stored, n_bytes: int) -> None:
        """Tensors of types that are not decoded here, and of plain floats but for vectors, stay as they are.

        n_bytes  of the whole file
        """
        self._source = stored
        self._moving: dict[str, dict[str, _Moving]] = {}
        self._steps = 0
        n_weights = 0
        for name in stored.names():
            n_weights += torch.Size(stored.shape(name)).numel()
            matrices = stored.matrices(name)
            if matrices is not None and hasattr(matrices[0].grid, "bases"):
                q = joined(matrices)
                bases = [key for key, value in q.params.items() if value.dtype in STORED]
                rate = 2.0 ** (REFERENCE_BITS - q.grid.bits_per_weight(q.shape[1]))
                self._moving[name] = {key: _Moving(q.params[key].float(), rate) for key in bases}
        rate = 2.0 ** (REFERENCE_BITS - 8 * n_bytes / n_weights)
        for name in stored.names():
            if len(stored.shape(name)) == 1 and name.rsplit(".", 1)[-1] in ("weight", "bias"):
                self._moving[name] = {WHOLE: _Moving(stored.read(name), rate)}
        self._moving = {name: parameters for name, parameters in self._moving.items() if parameters}

    @property
    def n_moving(self) -> int:
        """How many numbers move."""
        return sum(each.start.numel() for parameters in self._moving.values() for each in parameters.values())

    def moves(self, name: str) -> bool:
        """Whether anything in a tensor does."""
        return name in self._moving

    def read(self, name: str) -> Tensor:
        """A tensor as a file would hold it now, decoded to float32."""
        parameters = self._moving.get(name)
        if parameters is None:
            return self._source.read(name)
        if WHOLE in parameters:
            return parameters[WHOLE].value
        return self._moved(name).dequantize().view(self._source.shape(name))

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
        for _, _, each in self._all():
            each.step(rate, self._steps)

    def state(self) -> list[Tensor]:
        """A copy of all changes."""
        return [u.clone() for _, _, each in self._all() for u in each.changes()]

    def restore(self, state: list[Tensor]) -> None:
        """Back to such a copy."""
        held = iter(state)
        for _, _, each in self._all():
            for u in each.changes():
                u.copy_(next(held))

    def moved(self, name: str) -> QuantizedTensor | Tensor:
        """A tensor in which something moves as it is now: a matrix, or a float32 vector."""
        parameters = self._moving[name]
        return parameters[WHOLE].value if WHOLE in parameters else self._moved(name)

    def moving(self) -> list[str]:
        """The tensors in which something moves."""
        return list(self._moving)

    def _all(self) -> Iterator[tuple[str, str, _Moving]]:
        for name, parameters in self._moving.items():
            for key, each in parameters.items():
                yield name, key, each

    def _stored(self, name: str) -> QuantizedTensor:
        matrices = self._source.matrices(name)
        assert matrices is not None  # only these move
        return joined(matrices)

    def _moved(self, name: str) -> QuantizedTensor:
        stored = self._stored(name)
        moved = {key: each.value.to(stored.params[key].dtype) for key, each in self._moving[name].items()}
        return QuantizedTensor(stored.grid, stored.shape, stored.codes, {**stored.params, **moved})
