"""What is already quantized, matrix by matrix, under GGUF names and in GGUF's order of rows, whatever file holds it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.quantized import QuantizedTensors
from whit.checkpoints.stacked import StackedTensors
from whit.errors import RecipeError
from whit.grids.codebook import Codebook
from whit.grids.quantized import QuantizedTensor
from whit.grids.scaled import PerChannel, Scaled
from whit.layouts.ggml import GGML_TYPES
from whit.models.architecture import GGUFView
from whit.models.links import Links
from whit.models.model import Model
from whit.pipeline.quantize import model_view


class Stored(Protocol):
    """The tensors of one quantized model."""

    def names(self) -> Sequence[str]:
        """All tensors, in GGUF's order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """As in a GGUF file, outermost first."""
        ...

    def matrices(self, name: str) -> list[QuantizedTensor] | None:
        """One [rows, cols] matrix, or one per expert; None for floats."""
        ...

    def read(self, name: str) -> Tensor:
        """The values, decoded, float32."""
        ...


def stored_of(model: Model) -> Stored:
    """The tensors of a GGUF file or a folder."""
    if model.gguf_tensors is not None:
        return _GGUF(model.gguf_tensors)
    return _Folder(model, model_view(model))


class _GGUF:
    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def names(self) -> Sequence[str]:
        return self._file.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.info(name).shape

    def matrices(self, name: str) -> list[QuantizedTensor] | None:
        info = self._file.info(name)
        kind = GGML_TYPES.get(info.dtype)
        if kind is None or not kind.fields:
            return None
        whole = kind.unpack(self._file.raw(name), (math.prod(info.shape[:-1]), info.shape[-1]))
        return split_rows(whole, info.shape[0] if len(info.shape) == 3 else 1)

    def read(self, name: str) -> Tensor:
        return self._file.read(name).float()


class _Folder:
    def __init__(self, model: Model, view: GGUFView) -> None:
        self._source, self._links = model.tensors, Links(view)
        self._tensors = {tensor.name: tensor for tensor in view.tensors}
        self._homes: dict[str, list[str]] = {}
        for name in self._links.disk_names():
            for gguf in self._links.sources(name):
                self._homes.setdefault(gguf, []).append(name)

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def matrices(self, name: str) -> list[QuantizedTensor] | None:
        source, homes = self._source, self._homes.get(name, [])
        if isinstance(source, StackedTensors) and homes and source.is_quantized(homes[0]):
            ways = self._links.sources(homes[0])
            n_experts = self._tensors[name].shape[0]
            return [source.matrix(homes[0], expert, ways.index(name), len(ways)) for expert in range(n_experts)]
        if not isinstance(source, QuantizedTensors) or not homes or not all(map(source.is_quantized, homes)):
            return None
        experts: dict[int, list[tuple[Tensor, Tensor, QuantizedTensor]]] = {}
        for home in homes:
            _, expert = self._links.source(home)
            rows, factor = self._links.disk_rows(home)
            experts.setdefault(expert, []).append((rows, factor, source.quantized(home)))
        return [gathered(experts[expert]) for expert in sorted(experts)]

    def read(self, name: str) -> Tensor:
        return self._tensors[name].read()


def joined(pieces: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One matrix of pieces that are rows of it, in order.

    Where each piece has one scale or table for all of its rows, every row of the whole has its own.
    """
    if len(pieces) == 1:
        return pieces[0]
    pieces = [_by_row(each) for each in pieces]
    first = pieces[0]
    params = {name: torch.cat([each.params[name] for each in pieces]) for name in first.params}
    rows = sum(each.shape[0] for each in pieces)
    return QuantizedTensor(first.grid, (rows, first.shape[1]), torch.cat([each.codes for each in pieces]), params)


def _by_row(piece: QuantizedTensor) -> QuantizedTensor:
    """The same values with parameters for every row."""
    if piece.grid.row_independent or not isinstance(piece.grid, Scaled | Codebook):
        return piece
    params = {name: value.expand(piece.shape[0], -1).contiguous() for name, value in piece.params.items()}
    return QuantizedTensor(replace(piece.grid, scheme=PerChannel()), piece.shape, piece.codes, params)


def split_rows(whole: QuantizedTensor, n: int) -> list[QuantizedTensor]:
    """A matrix in n parts with as many rows each."""
    if n == 1:
        return [whole]
    rows = whole.shape[0] // n
    parts = []
    for k in range(n):
        part = slice(k * rows, (k + 1) * rows)
        params = {name: value[part] for name, value in whole.params.items()}
        parts.append(QuantizedTensor(whole.grid, (rows, whole.shape[1]), whole.codes[part], params))
    return parts


def gathered(pieces: Iterable[tuple[Tensor, Tensor, QuantizedTensor]]) -> QuantizedTensor:
    """One matrix of pieces that know which of its rows they are. Raises RecipeError when their grids differ."""
    pieces = list(pieces)
    first = pieces[0][2]
    if any(q.grid != first.grid for _, _, q in pieces):
        raise RecipeError("parts of one matrix are on different grids; convert to f16 first.")
    n = sum(rows.numel() for rows, _, _ in pieces)
    order = torch.cat([rows for rows, _, _ in pieces]).argsort()
    codes = torch.cat([q.codes for _, _, q in pieces])[order]
    params: dict[str, Tensor] = {}
    for name, value in first.params.items():
        if value.dim() < 2 or value.shape[0] != first.shape[0]:
            params[name] = value  # shared by all rows
            continue
        parts = [
            q.params[name]
            if name == "zero" or not value.is_floating_point() or (factor == 1).all()
            else (q.params[name].float() / factor[:, None]).to(value.dtype)
            for _, factor, q in pieces
        ]
        params[name] = torch.cat(parts)[order]
    return QuantizedTensor(first.grid, (n, first.shape[1]), codes, params)
