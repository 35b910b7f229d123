"""GGUF tensors beside the parameters of transformers' module: which is which, and values in either direction.

Rounding works on the matrices of the output file, the forward pass on transformers' parameters. Between them lie
the two-way tables of known.py: a file tensor that has been replaced is read back through the same changes
(transposes, reordered rotary rows, fused parts) that any GGUF file is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from whit.checkpoints.source import TensorInfo
from whit.models.architecture import GGUFView, from_gguf
from whit.models.known_changes import Transposed
from whit.models.taps import Slot


class _Overlay:
    """The view's tensors as a source, of which some have been replaced."""

    def __init__(self, view: GGUFView) -> None:
        self._tensors = {tensor.name: tensor for tensor in view.tensors}
        self.replaced: dict[str, Tensor] = {}

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, tensor.shape, "F32", 4 * tensor.n_weights)

    def read(self, name: str) -> Tensor:
        if name in self.replaced:
            return self.replaced[name]
        return self._tensors[name].read()


class Links:
    """The two sides of one model."""

    def __init__(self, view: GGUFView) -> None:
        """Raises what `from_gguf` raises."""
        self._overlay = _Overlay(view)
        _, self._disk = from_gguf(view.metadata, self._overlay)
        self._slots: dict[str, list[Slot]] = defaultdict(list)  # GGUF tensor -> its parameters, experts in order
        self._direct: dict[str, str] = {}  # parameter -> name on disk
        self._rows: dict[tuple[object, int], tuple[Tensor, Tensor]] = {}
        self._stacked: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)  # -> (expert, part) -> name on disk
        for name in self._disk.names():
            origin = self._disk.origin(name)
            fused = origin.weight.fused if origin.weight.of_experts else None
            parameter = fused.disk.format(i=origin.block) if fused else name
            for pattern, replacement in self._disk.module_names:
                parameter = re.sub(pattern, replacement, parameter)
            if fused:
                self._stacked[parameter][origin.start, fused.part] = name
            else:
                self._direct[parameter] = name
            for each in self._disk.origins(name):
                stack = range(each.n) if each.weight.stacked else [each.start if fused else None]
                self._slots[each.gguf] += [(parameter, expert) for expert in stack]

    def slots(self, gguf: str) -> list[Slot]:
        """The parameters that a GGUF tensor is made of; for experts one slot each, in order."""
        return self._slots.get(gguf, [])

    def gguf_names(self, prefix: str) -> list[str]:
        """The GGUF tensors with a parameter under `prefix`, in file order."""
        return [name for name, slots in self._slots.items() if any(slot[0].startswith(prefix) for slot in slots)]

    def made_of(self, parameter: str) -> list[str]:
        """The GGUF tensors that a parameter is made of."""
        return [name for name, slots in self._slots.items() if any(slot[0] == parameter for slot in slots)]

    def homes(self, parameter: str) -> list[list[str]]:
        """The names on disk that a parameter is made of: per expert (one for a plain matrix) its parts, row after row.

        Empty for one that is not on disk.
        """
        if parameter in self._direct:
            return [[self._direct[parameter]]]
        pieces = self._stacked.get(parameter, {})
        n_experts = 1 + max((expert for expert, _ in pieces), default=-1)
        return [[pieces[key] for key in sorted(pieces) if key[0] == expert] for expert in range(n_experts)]

    def read(self, parameter: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter's values, from replaced tensors where there are some. Raises KeyError for an unknown one."""
        if parameter in self._direct:
            return self._disk.read(self._direct[parameter]).reshape(shape)
        pieces = self._stacked[parameter]
        experts = 1 + max((expert for expert, _ in pieces), default=-1)
        n_parts = 1 + max((part for _, part in pieces), default=-1)
        if not experts:
            raise KeyError(parameter)
        rows = [
            torch.cat([self._disk.read(pieces[expert, part]) for part in range(n_parts)]) for expert in range(experts)
        ]
        return torch.stack(rows).reshape(shape)

    def disk_names(self) -> Sequence[str]:
        """The names of all weights in a transformers folder, in the order of the GGUF file."""
        return self._disk.names()

    def disk_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight in a transformers folder."""
        return self._disk.origin(name).shape

    def sources(self, name: str) -> list[str]:
        """The GGUF tensors that a weight in a folder is in: several for matrices whose rows come in turn."""
        return [origin.gguf for origin in self._disk.origins(name)]

    def stacked(self, name: str) -> bool:
        """Whether a weight in a folder holds the matrices of all experts."""
        return self._disk.origin(name).weight.stacked

    def source(self, name: str) -> tuple[str, int]:
        """The (first) GGUF tensor that a weight in a folder is in, and which matrix of it: an expert, else 0."""
        origin = self._disk.origin(name)
        return origin.gguf, origin.start if origin.weight.of_experts else 0

    def disk_read(self, name: str) -> Tensor:
        """A weight as a folder has it, from replaced tensors where there are some."""
        return self._disk.read(name)

    def lies(self, name: str) -> bool:
        """Whether a folder has this weight on its side, [in, out], as transformers' Conv1D does."""
        return self._disk.origin(name).weight.change == Transposed()

    def disk_rows(self, name: str) -> tuple[Tensor, Tensor]:
        """Which rows of its GGUF matrix a weight in a folder has, [n] int64, and what multiplies them there [n].

        The matrix as a folder has it may lie on its side; rows are outputs here.
        """
        origin = self._disk.origin(name)
        key = origin.weight, origin.start if not origin.weight.of_experts else 0
        if key not in self._rows:
            info = self._overlay.info(origin.gguf)
            marks = torch.zeros(
                info.shape
            )  # which row it is in the first column, ones in the second: some tables scale
            marks[..., 0] = torch.arange(info.shape[-2], dtype=torch.float32)
            marks[..., 1] = 1
            kept = dict(self._overlay.replaced)
            self.replace(origin.gguf, marks)
            found = self._disk.read(name)
            self._overlay.replaced = kept
            self._disk.forget()
            number, one = (found.T if self.lies(name) else found)[:, :2].unbind(1)
            self._rows[key] = (number / one).round().long(), one.clone()
        return self._rows[key]

    def replace(self, gguf: str, W: Tensor) -> None:
        """From now on the GGUF tensor `gguf` has these values, float32, in its shape."""
        self._overlay.replaced[gguf] = W
        self._disk.forget()

    def release(self, gguf: str) -> None:
        """Forget the replacement of one tensor."""
        self._overlay.replaced.pop(gguf, None)
        self._disk.forget()

    def restore(self) -> None:
        """Forget all replacements."""
        self._overlay.replaced.clear()
        self._disk.forget()
