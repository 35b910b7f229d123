"""Facts about an architecture that take more than renaming a number: windows, head sizes, demands of a graph.

Each trait writes GGUF keys from a configuration and reads them back. What llama.cpp's graph cannot compute is
refused here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from whit.errors import ModelError
from whit.models.known_changes import Dims
from whit.models.known_table import Facts, Stored, Trait

SOURCE = "whit.source_architecture"


@dataclass(frozen=True)
class Required(Trait):
    """An entry that must have one of a few values, because the graph has only one function.

    entry    name in config.json
    default  the class default
    allowed  values that compute what the graph computes
    written  the value that a GGUF file implies
    why      the rest of the sentence "... is X, but "
    """

    entry: str
    default: Any
    allowed: tuple[Any, ...]
    written: Any
    why: str

    @property
    def defaults(self) -> Facts:
        """The entry."""
        return {self.entry: self.default}

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """The value under a key of Whit's own when GGUF could not tell it. Raises ModelError for other values."""
        value = facts[self.entry]
        if not any(value is known or (value == known and type(value) is type(known)) for known in self.allowed):
            raise ModelError(f"config.json: {self.entry} is {value!r}, but {self.why}.")
        return {f"whit.{self.entry}": value} if isinstance(value, str) and value != self.written else {}

    def config(self, stored: Stored, dims: Dims) -> dict[str, Any]:
        """The entry."""
        return {self.entry: stored.get(f"whit.{self.entry}", self.written)}


@dataclass(frozen=True)
class Always(Trait):
    """GGUF keys with the same value in every file of this architecture."""

    keys: Mapping[str, Any]

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """The keys."""
        return dict(self.keys)


@dataclass(frozen=True)
class Also(Trait):
    """A size under one more GGUF key, as llama.cpp's own converter writes it."""

    key: str
    size: str

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """The key."""
        return {self.key: dims[self.size]}


@dataclass(frozen=True)
class Flag(Trait):
    """A yes or no in config.json that a GGUF file shows by having a tensor."""

    entry: str
    default: bool
    tensor: str

    @property
    def defaults(self) -> Facts:
        """The entry."""
        return {self.entry: self.default}

    def config(self, stored: Stored, dims: Dims) -> dict[str, Any]:
        """Whether the tensor is there."""
        return {self.entry: stored.has(self.tensor)}


@dataclass(frozen=True)
class EqualTo(Trait):
    """An entry that must equal another one when it is given."""

    entry: str
    other: str
    why: str

    @property
    def defaults(self) -> Facts:
        """The entry."""
        return {self.entry: None}

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """No keys. Raises ModelError when they differ."""
        if facts[self.entry] not in (None, facts[self.other]):
            raise ModelError(f"config.json: {self.entry} is {facts[self.entry]!r}, but {self.why}.")
        return {}


@dataclass(frozen=True)
class HeadSize(Trait):
    """Width of a head, where it is free."""

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """Written always: llama.cpp would derive it from the embedding."""
        return {"attention.key_length": dims["head_dim"], "attention.value_length": dims["head_dim"]}

    def config(self, stored: Stored, dims: Dims) -> dict[str, Any]:
        """The entry `head_dim`. Raises ModelError when keys and values have different widths."""
        derived = dims["hidden"] // dims["heads"]
        key, value = stored.get("attention.key_length", derived), stored.get("attention.value_length", derived)
        if key != value or not isinstance(key, int) or key < 1:
            raise ModelError(f"attention.key_length is {key!r} and value_length {value!r}; they must be equal.")
        return {"head_dim": key}


@dataclass(frozen=True)
class ClampedWindow(Trait):
    """A sliding window in a graph that has none: the file claims no more context than the window.

    Within the window both compute the same; beyond it llama.cpp would attend to everything, which is another
    function. `entry` comes back from the key that other tools write too; llama.cpp ignores it in these graphs.

    default   class default of `sliding_window`
    switched  whether config.json has `use_sliding_window` (and windows only from block `max_window_layers` on)
    """

    default: int | None = None
    switched: bool = False

    @property
    def defaults(self) -> Facts:
        """The window and, where there is one, its switch."""
        switch = {"use_sliding_window": False, "max_window_layers": 28, "layer_types": None} if self.switched else {}
        return {"sliding_window": self.default, **switch}

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """The context length, at most the window, and the window."""
        window, context = facts["sliding_window"], facts["max_position_embeddings"]
        if not window or (self.switched and not self._slides(facts, dims)):
            return {}
        kept = {} if self.switched else {"attention.sliding_window": window}
        return {"context_length": min(context, window), **kept}

    def config(self, stored: Stored, dims: Dims) -> dict[str, Any]:
        """The window, when the file has one."""
        if self.switched:
            return {"use_sliding_window": False}
        return {"sliding_window": stored.get("attention.sliding_window") or None}

    def _slides(self, facts: Facts, dims: Dims) -> bool:
        types = facts["layer_types"]
        windowed = "sliding_attention" in types if types else facts["max_window_layers"] < dims["layers"]
        return bool(facts["use_sliding_window"]) and windowed


@dataclass(frozen=True)
class WindowPattern(Trait):
    """Sliding windows in all blocks but every `period`-th, as Gemma 2 and 3 have them."""

    period: int
    default: int = 4096

    @property
    def defaults(self) -> Facts:
        """Window and pattern, in the new and the old spelling."""
        return {"sliding_window": self.default, "layer_types": None, "sliding_window_pattern": self.period}

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """The window; the pattern too when it is not the one that the graph assumes."""
        window = facts["sliding_window"]
        if not isinstance(window, int) or window < 1:
            raise ModelError(f"config.json: sliding_window is {window!r}, but the graph needs a number of tokens.")
        period, types = facts["sliding_window_pattern"] or self.period, facts["layer_types"]
        sliding = [kind == "sliding_attention" for kind in types] if types else self._pattern(period, dims)
        if len(sliding) != dims["layers"]:
            raise ModelError(f"config.json: layer_types has {len(sliding)} entries for {dims['layers']} layers.")
        usual = sliding == self._pattern(self.period, dims)
        pattern = {} if usual else {"attention.sliding_window_pattern": sliding}
        return {"attention.sliding_window": window, **pattern}

    def config(self, stored: Stored, dims: Dims) -> dict[str, Any]:
        """Window and layer types."""
        pattern = stored.get("attention.sliding_window_pattern", self.period)
        sliding = self._pattern(pattern, dims) if isinstance(pattern, int) else [bool(entry) for entry in pattern]
        types = ["sliding_attention" if entry else "full_attention" for entry in sliding[: dims["layers"]]]
        return {"sliding_window": stored.get("attention.sliding_window", self.default), "layer_types": types}

    @staticmethod
    def _pattern(period: int, dims: Dims) -> list[bool]:
        return [bool((block + 1) % period) for block in range(dims["layers"])]


@dataclass(frozen=True)
class QueryScale(Trait):
    """Gemma divides queries by sqrt(query_pre_attn_scalar); the graph knows two values for it.

    It uses the width of a head, except for `layers_of_27b` blocks, where it uses hidden size / heads.
    """

    layers_of_27b: int
    default: int = 256

    @property
    def defaults(self) -> Facts:
        """The entry."""
        return {"query_pre_attn_scalar": self.default}

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """No keys. Raises ModelError for a third value."""
        value, known = facts["query_pre_attn_scalar"], self._known(dims)
        if value != known:
            raise ModelError(
                f"config.json: query_pre_attn_scalar is {value!r}, but llama.cpp would use {known} for this model."
            )
        return {}

    def config(self, stored: Stored, dims: Dims) -> dict[str, Any]:
        """The value that the graph uses."""
        return {"query_pre_attn_scalar": self._known(dims)}

    def _known(self, dims: Dims) -> int:
        return dims["hidden"] // dims["heads"] if dims["layers"] == self.layers_of_27b else dims["head_dim"]


@dataclass(frozen=True)
class Marked(Trait):
    """A model that runs on another architecture's graph says which it is under a key of Whit's own."""

    model_type: str

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """The mark."""
        return {SOURCE: self.model_type}
