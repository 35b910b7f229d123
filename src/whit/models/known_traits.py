"""Facts about an architecture that take more than renaming a number: positions, windows, demands of a graph.

Each trait writes GGUF keys (and sometimes small tensors) from a configuration and reads them back. What
llama.cpp's graph cannot compute is refused here, before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from whit.errors import ModelError
from whit.models.known_changes import Dims
from whit.models.known_table import Extra, Facts, Stored, Trait

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


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
        period, types = facts["sliding_window_pattern"], facts["layer_types"]
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
class Rope(Trait):
    """Rotary positions, in both styles of config.json (`rope_parameters`, or `rope_theta` with `rope_scaling`).

    kinds        scalings that the graph can compute
    theta        class default of the base
    theta_name   its old name
    partial      class default of the share of a head that rotates, None where all must
    partial_name its old name
    original     class default of a top-level `original_max_position_embeddings`, None where there is none
    """

    kinds: tuple[str, ...]
    theta: float = 10000.0
    theta_name: str = "rope_theta"
    partial: float | None = None
    partial_name: str = "partial_rotary_factor"
    original: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Frequency factors."""
        llama3 = (FREQS,) if "llama3" in self.kinds else ()
        return (*llama3, LONG, SHORT) if "longrope" in self.kinds else llama3

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """Base, rotated width and scaling. Raises ModelError for a scaling that the graph does not have."""
        rope = self._parameters(facts)
        keys = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": self._rotated(rope, dims)}
        if self.original is not None:
            keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        kind = rope["rope_type"]
        if kind in ("default", "dynamic"):  # dynamic scaling begins where the claimed context ends
            return keys
        if kind not in self.kinds:
            known = ", ".join(("default", "dynamic", *self.kinds))
            raise ModelError(f"config.json: rope type {kind!r} is none that llama.cpp has here. It has {known}.")
        if kind == "linear":
            return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": _needed(rope, "factor")}
        if kind == "yarn":
            return keys | _yarn_keys(rope, facts)
        if kind == "longrope" and not _is_one_set_of_factors(rope, facts):
            return keys | {
                "rope.scaling.type": "longrope",
                "rope.scaling.original_context_length": int(_original(rope, facts)),
                "rope.scaling.attn_factor": _longrope_attention(rope, facts),
            }
        return keys

    def extras(self, facts: Facts, dims: Dims) -> list[Extra]:
        """Frequency factors, float32 [rotated width / 2]."""
        rope = self._parameters(facts)
        n = self._rotated(rope, dims) // 2
        if rope["rope_type"] == "llama3":
            return [_vector(FREQS, llama3_factors(rope, 2 * n), n)]
        if rope["rope_type"] != "longrope":
            return []
        long, short = _needed(rope, "long_factor"), _needed(rope, "short_factor")
        if _is_one_set_of_factors(rope, facts) and "llama3" in self.kinds:
            return [_vector(FREQS, long, n)]
        return [_vector(LONG, long, n), _vector(SHORT, short, n)]

    def config(self, stored: Stored, dims: Dims) -> dict[str, Any]:
        """`rope_parameters`, in the new style."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(stored.get("rope.freq_base", 10000.0))}
        rotated = stored.get("rope.dimension_count", dims["head_dim"])
        if self.partial is not None:
            rope["partial_rotary_factor"] = rotated / dims["head_dim"]
        context = stored.number("context_length")
        original = stored.get("rope.scaling.original_context_length", context)
        kind, factor = stored.get("rope.scaling.type"), stored.get("rope.scaling.factor")
        factor = stored.get("rope.scale_linear") if factor is None else factor
        if stored.has(FREQS) and FREQS in self.names:
            rope |= _named_factors(stored.tensors.read(FREQS).float(), rope["rope_theta"], original)
        elif stored.has(LONG) and LONG in self.names:
            rope |= {
                "rope_type": "longrope",
                "long_factor": stored.tensors.read(LONG).tolist(),
                "short_factor": stored.tensors.read(SHORT).tolist(),
                "attention_factor": float(stored.get("rope.scaling.attn_factor", 1.0)),
                "original_max_position_embeddings": original,
            }
        elif kind == "yarn" and factor:
            scale = float(stored.get("rope.scaling.attn_factor", 1.0)) * _yarn_attention(factor)
            rope |= {"rope_type": "yarn", "factor": float(factor), "attention_factor": scale}
            rope["original_max_position_embeddings"] = original
        elif kind in (None, "linear") and factor and factor != 1:
            rope |= {"rope_type": "linear", "factor": float(factor)}
        return {"rope_parameters": rope} | (
            {} if self.original is None else {"original_max_position_embeddings": original}
        )

    def _parameters(self, facts: Facts) -> dict[str, Any]:
        rope = dict(facts.get("rope_scaling") or facts.get("rope_parameters") or {})
        rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        if rope["rope_type"] == "su":  # the first name of longrope
            rope["rope_type"] = "longrope"
        rope.setdefault("rope_theta", facts.get(self.theta_name) or self.theta)
        if self.partial is not None:
            rope.setdefault("partial_rotary_factor", facts.get(self.partial_name, self.partial))
        if self.original is not None:
            rope["original_max_position_embeddings"] = facts.get("original_max_position_embeddings", self.original)
        return rope

    def _rotated(self, rope: dict[str, Any], dims: Dims) -> int:
        share = rope.get("partial_rotary_factor", 1.0)
        if self.partial is None and share != 1.0:
            raise ModelError(f"config.json: partial_rotary_factor is {share!r}, but here the whole head must rotate.")
        return int(dims["head_dim"] * share)


@dataclass(frozen=True)
class LocalRope(Trait):
    """Gemma 3: one base for blocks that see everything, possibly scaled, another for blocks with a window."""

    global_theta: float = 1_000_000.0
    local_theta: float = 10_000.0

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """Both bases and the scaling. Raises ModelError for what the graph does not have."""
        full, local = self._parameters(facts)
        keys = {"rope.freq_base": float(full["rope_theta"]), "rope.freq_base_swa": float(local["rope_theta"])}
        kind = full.get("rope_type", full.get("type", "default"))
        if kind not in ("default", "linear") or local.get("rope_type", "default") != "default":
            raise ModelError(f"config.json: rope type {kind!r} is none that llama.cpp has here: default or linear.")
        keys["rope.dimension_count"] = dims["head_dim"]
        if kind == "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": _needed(full, "factor")}
        return keys

    def config(self, stored: Stored, dims: Dims) -> dict[str, Any]:
        """`rope_parameters` by layer type."""
        full: dict[str, Any] = {"rope_type": "default", "rope_theta": float(stored.get("rope.freq_base", 10000.0))}
        factor = stored.get("rope.scaling.factor")
        if factor and factor != 1:
            full |= {"rope_type": "linear", "factor": float(factor)}
        theta = float(stored.get("rope.freq_base_swa", self.local_theta))
        local = {"rope_type": "default", "rope_theta": theta}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}

    def _parameters(self, facts: Facts) -> tuple[dict[str, Any], dict[str, Any]]:
        nested = facts.get("rope_parameters") or {}
        full = dict(nested.get("full_attention") or {}) | dict(facts.get("rope_scaling") or {})
        local = dict(nested.get("sliding_attention") or {})
        full.setdefault("rope_theta", facts.get("rope_theta") or self.global_theta)
        local.setdefault("rope_theta", facts.get("rope_local_base_freq") or self.local_theta)
        return full, local


@dataclass(frozen=True)
class Marked(Trait):
    """A model that runs on another architecture's graph says which it is under a key of Whit's own."""

    model_type: str

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """The mark."""
        return {SOURCE: self.model_type}


SOURCE = "whit.source_architecture"


def llama3_factors(rope: Mapping[str, Any], rotated: int) -> list[float]:
    """What Llama 3 divides each rotary frequency by: 1 for fast ones, `factor` for slow ones, a blend between.

    Source: transformers' definition of the rope type "llama3".
    """
    factor, old = _needed(rope, "factor"), _needed(rope, "original_max_position_embeddings")
    low, high = _needed(rope, "low_freq_factor"), _needed(rope, "high_freq_factor")
    turns = [old / (2 * math.pi * rope["rope_theta"] ** (i / rotated)) for i in range(0, rotated, 2)]
    smooth = [min(1.0, max(0.0, (t - low) / (high - low))) for t in turns]
    return [1 / ((1 - s) / factor + s) for s in smooth]


def _named_factors(factors: torch.Tensor, theta: float, context: int) -> dict[str, Any]:
    """Frequency factors as Llama 3's rule where its published constants explain them, else as they are."""
    rule = {"rope_type": "llama3", "rope_theta": theta, "factor": float(factors.max())}
    rule |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if torch.allclose(torch.tensor(llama3_factors(rule, 2 * len(factors))), factors, rtol=1e-5):
        return rule
    return {
        "rope_type": "longrope",
        "long_factor": factors.tolist(),
        "short_factor": factors.tolist(),
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _is_one_set_of_factors(rope: Mapping[str, Any], facts: Facts) -> bool:
    return rope["long_factor"] == rope["short_factor"] and _longrope_attention(rope, facts) == 1.0


def _original(rope: Mapping[str, Any], facts: Facts) -> float:
    return rope.get("original_max_position_embeddings") or facts["max_position_embeddings"]


def _longrope_attention(rope: Mapping[str, Any], facts: Facts) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = _original(rope, facts)
    factor = rope.get("factor") or facts["max_position_embeddings"] / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn_attention(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_keys(rope: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    original = _original(rope, facts)
    factor = rope.get("factor") or facts["max_position_embeddings"] / original
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    if (fast, slow) != (32, 1) or not rope.get("truncate", True):
        raise ModelError(
            f"config.json: yarn with beta_fast {fast}, beta_slow {slow}, truncate {rope.get('truncate', True)}; "
            "llama.cpp has 32, 1 and true in this graph."
        )
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = _yarn_attention(factor, rope["mscale"]) / _yarn_attention(factor, rope["mscale_all_dim"])
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(factor),
        "rope.scaling.original_context_length": int(original),
    }
    extra = 1.0 if attention is None else attention / _yarn_attention(factor)  # llama.cpp has the usual one built in
    return keys if abs(extra - 1) < 1e-6 else keys | {"rope.scaling.attn_factor": float(extra)}


def _needed(rope: Mapping[str, Any], name: str) -> Any:
    if rope.get(name) is None:
        raise ModelError(f"config.json: rope type {rope['rope_type']!r} needs {name}, which is missing.")
    return float(rope[name]) if isinstance(rope[name], int | float) else rope[name]


def _vector(name: str, values: list[float], n: int) -> Extra:
    if len(values) != n:
        raise ModelError(f"config.json: {len(values)} rope factors for {n} rotary frequencies.")
    return Extra(name, (n,), lambda: torch.tensor(values, dtype=torch.float32))
