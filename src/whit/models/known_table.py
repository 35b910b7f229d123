"""The vocabulary in which an architecture is described: configuration keys, weights and traits.

One description serves both directions, a transformers folder to GGUF and back. A key is a number with a name on
each side; a weight is a tensor with a name on each side and a `Change` between them; a trait is whatever takes
more than renaming (positions, windows, demands that llama.cpp's graph makes).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from whit.checkpoints.source import TensorSource
from whit.errors import BrokenFileError, ModelError
from whit.models.known_changes import Change, Dims, Same, Shape

Facts = Mapping[str, Any]

NEVER_QUANTIZED = (
    (r"_norm\.(weight|bias)$", "norms stay in float"),
    (r"(^|\.)position_embd\.", "position embeddings stay in float"),
    (r"(^|\.)token_types\.", "token type embeddings stay in float"),
    (r"\.ffn_gate_inp(_shexp)?\.", "router gates stay in float"),
    (r"_exps\.bias$", "biases stay in float"),
    (r"\.ssm_conv1d\.|\.(time_mix_(first|w1|w2|lerp)|attn_rel_b)", "small recurrent weights stay in float"),
)


def float_reason(name: str, shape: Shape) -> str:
    """Why the GGUF tensor `name` must not be quantized, else an empty string."""
    for pattern, reason in NEVER_QUANTIZED:
        if re.search(pattern, name):
            return reason
    return "vectors stay in float" if len(shape) < 2 else ""


@dataclass(frozen=True)
class Key:
    """One entry of config.json.

    config    its name there
    default   the value of transformers' configuration class when the entry is missing
    gguf      its GGUF key without the architecture's name in front, "" when GGUF has none
    size      the name by which shapes refer to it, "" when none does
    kind      type of the value
    if_none   what a missing value or None stands for, from the other entries
    optional  None is a value; GGUF then has no such key
    aliases   other names in use
    """

    config: str
    default: Any
    gguf: str = ""
    size: str = ""
    kind: type = int
    if_none: Callable[[Facts], Any] | None = None
    optional: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fused:
    """Experts in one three-dimensional tensor on disk: part number `part` of `of` along the rows."""

    disk: str
    part: int = 0
    of: int = 1


@dataclass(frozen=True)
class Weight:
    """One GGUF tensor, or one per block.

    gguf     template of its name; {i} is the block
    disk     templates of the tensors it is made of, by rows in this order; {e} stands for every expert
    shape    its shape in GGUF, in names of sizes; "q+kv+kv" adds up, and says the rows of each tensor on disk
    change   the difference between the sides, applied to each tensor on disk
    when     name of the configuration entry that must be true for the weight to exist, "" for always
    derived  made from a tensor that another weight carries; the way back ignores it
    fused    where else experts may be on disk
    """

    gguf: str
    disk: tuple[str, ...]
    shape: tuple[str, ...]
    change: Change = field(default_factory=Same)
    when: str = ""
    derived: bool = False
    fused: Fused | None = None

    @property
    def per_block(self) -> bool:
        """Whether every block has one."""
        return "{i}" in self.gguf

    @property
    def of_experts(self) -> bool:
        """Whether it stacks what is one tensor per expert on disk."""
        return "{e}" in self.disk[0]

    @property
    def stacked(self) -> bool:
        """Whether all experts are in one tensor on disk, too."""
        return len(self.shape) == 3 and not self.of_experts

    def gguf_shape(self, dims: Dims) -> Shape:
        """Shape in GGUF, outermost first."""
        return tuple(sum(dims[term] for term in size.split("+")) for size in self.shape)

    def piece_shapes(self, dims: Dims) -> list[Shape]:
        """GGUF shape of what comes from each tensor on disk; for experts, that of one expert's matrix."""
        shape = self.gguf_shape(dims)
        if self.of_experts:
            return [shape[1:]]
        if len(self.disk) == 1:
            return [shape]
        return [(dims[term], *shape[1:]) for term in self.shape[0].split("+")]


@dataclass(frozen=True)
class Extra:
    """A GGUF tensor that follows from the configuration alone."""

    name: str
    shape: Shape
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Stored:
    """The GGUF side: metadata of one architecture, and the tensors."""

    graph: str
    metadata: Mapping[str, Any]
    tensors: TensorSource

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in set(self.tensors.names())

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key` as a Python value; float32 values come back as the short decimal that was meant."""
        value = self.metadata.get(full_key(self.graph, key), default)
        if isinstance(value, np.generic):
            value = value.item()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def number(self, key: str) -> Any:
        """The value of `key`, which must be there and be one number. Raises BrokenFileError or ModelError."""
        value = self.get(key)
        if value is None:
            raise BrokenFileError(f"The GGUF file has no key {full_key(self.graph, key)}, which {self.graph} needs.")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(
                f"{full_key(self.graph, key)} is {value!r}; Whit reads models where it is one number for all blocks."
            )
        return value


def full_key(graph: str, key: str) -> str:
    """`key` with the architecture's name in front; Whit's own keys keep theirs."""
    return key if key.startswith("whit.") else f"{graph}.{key}"


class Trait:
    """A fact that takes more than a renamed number. Members are final and say only what they know."""

    @property
    def defaults(self) -> Facts:
        """Configuration entries it reads, with the class defaults."""
        return {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of GGUF tensors that belong to it."""
        return ()

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """Keys to write. Raises ModelError when llama.cpp's graph cannot express the configuration."""
        return {}

    def extras(self, facts: Facts, dims: Dims) -> list[Extra]:
        """Tensors to write."""
        return []

    def config(self, stored: Stored, dims: Dims) -> dict[str, Any]:
        """Configuration entries that the file implies."""
        return {}


@dataclass(frozen=True)
class Architecture:
    """Everything that differs between one architecture and the next.

    model_type  name in config.json
    graph       name of llama.cpp's graph, the first part of GGUF keys
    class_name  transformers' class
    tied        whether the head is the embedding when config.json does not say
    keys, traits, weights  see there; weights in llama.cpp's order: before the blocks, per block, after the blocks
    head        the last weight: "optional" may be tied, "required" is written even when tied, "never" must be tied
    renames     (pattern, replacement) that turn other spellings on disk into the names of the table
    ignored     patterns of tensors on disk that carry no information
    module_names  (pattern, replacement) that turn names on disk into those of transformers' parameters
    recognises  whether a GGUF file of this graph is this architecture
    """

    model_type: str
    graph: str
    class_name: str
    tied: bool
    keys: tuple[Key, ...]
    traits: tuple[Trait, ...]
    weights: tuple[Weight, ...]
    head: Literal["optional", "required", "never"] = "optional"
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    module_names: tuple[tuple[str, str], ...] = ()
    recognises: Callable[[Stored], bool] = lambda stored: True

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with every missing entry filled in. Raises ModelError for values of the wrong kind."""
        facts = {"tie_word_embeddings": self.tied}
        for trait in self.traits:
            facts |= trait.defaults
        facts |= {key.config: key.default for key in self.keys} | dict(config)
        for key in self.keys:
            given = [facts[name] for name in (key.config, *key.aliases) if config.get(name) is not None]
            value = given[0] if given else facts[key.config]
            if value is None and key.if_none:
                value = key.if_none(facts)
            facts[key.config] = _checked(key, value)
        return facts

    def dims(self, facts: Facts) -> dict[str, int]:
        """Sizes by name, those that follow from others included."""
        dims = {key.size: facts[key.config] for key in self.keys if key.size}
        dims.setdefault("kv_heads", dims["heads"])
        dims.setdefault("head_dim", dims["hidden"] // dims["heads"])
        return dims | {"q": dims["heads"] * dims["head_dim"], "kv": dims["kv_heads"] * dims["head_dim"]}


def _checked(key: Key, value: Any) -> Any:
    if value is None and key.optional:
        return None
    good = isinstance(value, int | float) if key.kind is float else isinstance(value, key.kind)
    if not good or isinstance(value, bool) != (key.kind is bool) or (key.size and value < 1):
        wanted = "a positive number" if key.size else f"of type {key.kind.__name__}"
        raise ModelError(f"{key.config} is {value!r} in the configuration, but it must be {wanted}.")
    return key.kind(value)
