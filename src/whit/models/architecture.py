"""From a transformers folder to what a GGUF file holds, and back, as the tables in known.py say.

Both directions read headers only: a view lists names, shapes and lazily read parts; values pass through when
somebody asks for them. Tokenizers and general.* keys are not the architecture's business and are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whit.checkpoints.source import TensorSource, read_some
from whit.errors import BrokenFileError, ModelError, UnknownArchitectureError
from whit.models.from_gguf import FromGGUF, check_shape, some_of, stages
from whit.models.known import ARCHITECTURES, REFUSED
from whit.models.known_changes import Dims, Shape, Transposed
from whit.models.known_table import Architecture, Facts, Stored, Weight, float_reason, full_key
from whit.models.model import Model

NOT_OURS = ("tokenizer.", "split.")


@dataclass(frozen=True)
class Part:
    """A piece of a GGUF tensor that is read at once.

    shape  its shape, outermost first
    read   the values, contiguous, in the stored float type
    """

    shape: Shape
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file, not yet read.

    name    name in the file
    shape   outermost first; experts are [experts, rows, cols]
    parts   what it consists of, along the first dimension
    reason  why it must stay in float, else empty
    """

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    reason: str = ""

    @property
    def keep_float(self) -> bool:
        """Whether it must never be quantized."""
        return bool(self.reason)

    @property
    def n_weights(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """All values, float32."""
        first, *rest = (part.read().float() for part in self.parts)
        return torch.cat([first, *rest]) if rest else first  # most have one part, which may be large: no copy


@dataclass(frozen=True)
class GGUFView:
    """What a GGUF file will say, tokenizer aside.

    architecture  name of llama.cpp's graph
    metadata      keys with Python values
    tensors       in llama.cpp's order: embeddings, blocks, final norm, head
    """

    architecture: str
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]


def gguf_view(model: Model) -> GGUFView:
    """The GGUF side of a model that was opened from a transformers folder.

    Raises UnknownArchitectureError, ModelError for a configuration that llama.cpp cannot express or for tensors
    that nobody asked for, BrokenFileError for missing tensors and BadWeightsError for shapes that contradict
    the configuration. Only headers are read.
    """
    table = _table_of(model)
    facts = table.facts(model.config)
    dims = table.dims(facts)
    _check_blocks(dims, model.tensors)
    metadata = _metadata(table, facts, dims)  # first: it refuses what llama.cpp cannot compute
    folder = _Folder(model, table)
    staged = stages(_written(table, facts, folder), dims["layers"])
    extras = [extra for trait in table.traits for extra in trait.extras(facts, dims)]
    before, *rest = [[folder.tensor(weight, block, dims) for weight, block in stage] for stage in staged]
    additions = [
        GGUFTensor(extra.name, extra.shape, (Part(extra.shape, extra.read),), float_reason(extra.name, extra.shape))
        for extra in extras
    ]
    folder.check_complete(tied_head=table.weights[-1].disk[0])
    return GGUFView(table.graph, metadata, (*before, *additions, *(tensor for stage in rest for tensor in stage)))


def passthrough_view(metadata: Mapping[str, Any], tensors: TensorSource) -> GGUFView:
    """A GGUF file as it is: every key but the tokenizer's, every tensor under its own name in one part.

    Raises BrokenFileError when the file does not say which architecture it is.
    """
    kept = {key: value for key, value in metadata.items() if not key.startswith(NOT_OURS)}
    return GGUFView(_graph(metadata), kept, tuple(_as_is(name, tensors) for name in tensors.names()))


def from_gguf(metadata: Mapping[str, Any], tensors: TensorSource) -> tuple[dict[str, Any], FromGGUF]:
    """The transformers side of a GGUF file: config.json and tensors under the names on disk, read lazily.

    metadata  keys of the file; values may be numpy scalars
    tensors   its tensors under GGUF names, quantized ones decoded
    Raises UnknownArchitectureError, BrokenFileError for missing keys or tensors, BadWeightsError for shapes that
    contradict the metadata and ModelError for tensors or keys that the architecture does not have.
    """
    graph = _graph(metadata)
    stored = Stored(graph, metadata, tensors)
    table = _table_for(stored)
    if not stored.has("token_embd.weight"):
        raise BrokenFileError("The GGUF file has no tensor token_embd.weight.")
    config = _config_from(table, stored)
    facts = table.facts(config)
    dims = table.dims(facts)
    return config, FromGGUF(table, stored, _stored_weights(table, facts, stored), dims)


def turned_names(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether the weight of a name on disk is [in, out] there, as transformers' Conv1D has it."""
    table = ARCHITECTURES.get(str(config.get("model_type")))
    if table is None:
        return lambda name: False
    lines = [weight.disk for weight in table.weights if weight.change == Transposed()]
    patterns = [re.escape(name).replace(r"\{i\}", r"\d+") for disk in lines for name in disk]

    def turned(name: str) -> bool:
        for pattern, replacement in table.renames:
            name = re.sub(pattern, replacement, name)
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    return turned


def head_name(config: Mapping[str, Any]) -> str:
    """What the head's weight is called on disk, whether the model has one of its own or not."""
    table = ARCHITECTURES.get(str(config.get("model_type")))
    return table.weights[-1].disk[0] if table else "lm_head.weight"


def _graph(metadata: Mapping[str, Any]) -> str:
    graph = metadata.get("general.architecture")
    if not isinstance(graph, str):
        raise BrokenFileError("The GGUF file does not say which architecture it is (general.architecture).")
    return graph


def _table_of(model: Model) -> Architecture:
    model_type = model.config.get("model_type")
    if model_type in REFUSED:
        raise UnknownArchitectureError(f"{model.label}: {REFUSED[model_type]}")
    if model_type not in ARCHITECTURES:
        raise UnknownArchitectureError(f"{model.label}: the architecture {model_type!r} is not known. {_known()}")
    return ARCHITECTURES[model_type]


def _table_for(stored: Stored) -> Architecture:
    for table in ARCHITECTURES.values():
        if table.graph == stored.graph and table.recognises(stored):
            return table
    raise UnknownArchitectureError(f"The GGUF architecture {stored.graph!r} is not known. {_known()}")


def _known() -> str:
    listed = ", ".join(f"{table.model_type} (in GGUF: {table.graph})" for table in ARCHITECTURES.values())
    return f"Known are {listed}."


def _metadata(table: Architecture, facts: Facts, dims: Dims) -> dict[str, Any]:
    keys = {key.gguf: facts[key.config] for key in table.keys if key.gguf and facts[key.config] is not None}
    for trait in table.traits:
        keys |= trait.metadata(facts, dims)
    return {"general.architecture": table.graph} | {full_key(table.graph, key): value for key, value in keys.items()}


def _config_from(table: Architecture, stored: Stored) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": table.model_type, "architectures": [table.class_name]}
    config["vocab_size"] = stored.tensors.info("token_embd.weight").shape[0]  # the key is often left out
    for key in table.keys:
        if not key.gguf or key.config in config:
            continue
        present = stored.get(key.gguf) is not None
        if present or not (key.if_none or key.optional):
            config[key.config] = _typed(key.kind, stored, key.gguf)
    dims = table.dims(table.facts(config))
    _check_blocks(dims, stored.tensors)
    for trait in table.traits:  # the width of heads first: the others count on it
        config |= trait.config(stored, dims)
        dims = table.dims(table.facts(config))
    config["tie_word_embeddings"] = not stored.has("output.weight")
    for entry in ("bos_token_id", "eos_token_id"):
        config[entry] = stored.metadata.get(f"tokenizer.ggml.{entry}")
    # Never a class default: it may lie outside the vocabulary.
    config["pad_token_id"] = stored.metadata.get("tokenizer.ggml.padding_token_id")
    return config


def _typed(kind: type, stored: Stored, key: str) -> Any:
    if kind is bool:
        return bool(stored.number(key))
    return kind(stored.number(key))


def _written(table: Architecture, facts: Facts, folder: _Folder) -> list[Weight]:
    """The weights that the file will have. Raises ModelError for a head that llama.cpp cannot have."""
    *weights, head = [weight for weight in table.weights if not weight.when or facts[weight.when]]
    tied = bool(facts["tie_word_embeddings"]) or not folder.has(head.disk[0])
    if tied and table.head == "required":
        embedding = weights[0]
        return [*weights, Weight(head.gguf, embedding.disk, embedding.shape, derived=True)]
    if not tied and table.head == "never":
        raise ModelError(f"The head is not the embedding, but llama.cpp's {table.graph} graph has no other head.")
    return weights if tied else [*weights, head]


def _stored_weights(table: Architecture, facts: Facts, stored: Stored) -> list[Weight]:
    *weights, head = [weight for weight in table.weights if not weight.when or facts[weight.when]]
    return [*weights, head] if stored.has(head.gguf) else weights


def _check_blocks(dims: Dims, tensors: TensorSource) -> None:
    """Raise BrokenFileError for more blocks than tensors, before anything is made per block."""
    if dims["layers"] > len(tensors.names()):
        raise BrokenFileError(f"{dims['layers']} blocks are announced, but there are {len(tensors.names())} tensors.")


class _Folder:
    """Tensors on disk, found under the names of the table."""

    def __init__(self, model: Model, table: Architecture) -> None:
        self._label, self._table, self._source = model.label, table, model.tensors
        self._disk: dict[str, str] = {}  # name in the table -> name on disk
        for name in model.tensors.names():
            canonical = name
            for pattern, replacement in table.renames:
                canonical = re.sub(pattern, replacement, canonical)
            self._disk.setdefault(canonical, name)
        self._used: set[str] = set()
        self._missing: list[str] = []

    def has(self, name: str) -> bool:
        """Whether the table's `name` is on disk."""
        return name in self._disk

    def tensor(self, weight: Weight, block: int, dims: Dims) -> GGUFTensor:
        """One GGUF tensor; missing names are noted for `check_complete`."""
        name, shape = weight.gguf.format(i=block), weight.gguf_shape(dims)
        fused = weight.fused.disk.format(i=block) if weight.fused else ""
        if weight.of_experts and fused in self._disk and weight.disk[0].format(i=block, e=0) not in self._disk:
            parts = list(self._fused_parts(weight, fused, shape))
        elif weight.stacked:
            parts = list(self._stacked_parts(weight, block, shape, dims))
        else:
            parts = list(self._parts(weight, block, dims))
        return GGUFTensor(name, shape, tuple(parts), float_reason(name, shape))

    def check_complete(self, tied_head: str) -> None:
        """Raise BrokenFileError for missing tensors and ModelError for tensors that nobody asked for."""
        if self._missing:
            raise BrokenFileError(f"{self._label}: {some_of(self._missing)} missing from the weight files.")
        ignored = (*self._table.ignored, f"^{re.escape(tied_head)}$")
        extra = [
            disk
            for name, disk in self._disk.items()
            if name not in self._used and not any(re.search(pattern, name) for pattern in ignored)
        ]
        if extra:
            raise ModelError(
                f"{self._label}: {some_of(extra)} not part of {self._table.model_type}. "
                "A quantized checkpoint must be given in its original precision; adapters must be merged first."
            )

    def _parts(self, weight: Weight, block: int, dims: Dims) -> Iterator[Part]:
        shapes = weight.piece_shapes(dims)
        if weight.of_experts:
            count = min(dims["experts"], len(self._disk) + 1)  # an absurd number ends at the first missing one
            names = [weight.disk[0].format(i=block, e=expert) for expert in range(count)]
            shapes = shapes * count
        else:
            names = [name.format(i=block) for name in weight.disk]
        for name, shape in zip(names, shapes, strict=True):
            if self._found(name, weight.change.disk_shape(shape, dims)):
                yield self._part(weight, name, shape, block, dims)

    def _part(self, weight: Weight, name: str, shape: Shape, block: int, dims: Dims) -> Part:
        def read() -> Tensor:
            W = weight.change.to_gguf(self._read(name), dims, lambda other: self._read(other.format(i=block)))
            return W.contiguous()

        if weight.of_experts:
            return Part((1, *shape), lambda: read()[None])  # [1, rows, cols]
        return Part(shape, read)

    def _fused_parts(self, weight: Weight, name: str, shape: Shape) -> Iterator[Part]:
        """Experts one by one, for all at once are large."""
        fused, (n, rows, cols) = weight.fused, shape
        assert fused is not None  # the caller looked
        start = fused.part * rows
        if self._found(name, (n, fused.of * rows, cols)):
            yield from self._experts(name, shape, lambda W: W[:, start : start + rows])

    def _stacked_parts(self, weight: Weight, block: int, shape: Shape, dims: Dims) -> Iterator[Part]:
        name, change = weight.disk[0].format(i=block), weight.change
        if self._found(name, change.disk_shape(shape, dims)):
            yield from self._experts(name, shape, lambda W: change.to_gguf(W, dims, self._read))

    def _experts(self, name: str, shape: Shape, change: Callable[[Tensor], Tensor]) -> Iterator[Part]:
        def read(expert: int) -> Tensor:
            return change(read_some(self._source, self._disk[name], expert, 1)).contiguous()  # [1, rows, cols]

        for expert in range(shape[0]):
            yield Part((1, *shape[1:]), partial(read, expert))

    def _found(self, name: str, expected: Shape) -> bool:
        if name not in self._disk:
            self._missing.append(name)
            return False
        self._used.add(name)
        check_shape(self._disk[name], self._source.info(self._disk[name]).shape, expected, "config.json")
        return True

    def _read(self, name: str) -> Tensor:
        return self._source.read(self._disk[name])


def _as_is(name: str, tensors: TensorSource) -> GGUFTensor:
    shape = tensors.info(name).shape
    return GGUFTensor(name, shape, (Part(shape, lambda: tensors.read(name)),), float_reason(name, shape))
