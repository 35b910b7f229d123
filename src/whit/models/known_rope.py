"""Rotary positions: base, rotated width and scaling, in config.json and in GGUF.

GGUF has keys for linear and yarn scaling and tensors of frequency factors for the rules of Llama 3 and LongRoPE.
Dynamic scaling is written as none: it begins where the context that the file claims ends.
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
TRUNCATE = "whit.yarn_truncate"  # where it is unusual


@dataclass(frozen=True)
class Rope(Trait):
    """Rotary positions, in both styles of config.json (`rope_parameters`, or `rope_theta` with `rope_scaling`).

    kinds        scalings that the graph can compute
    theta        class default of the base
    theta_name   its old name
    partial      class default of the share of a head that rotates, None where all must
    partial_name its old name
    original     class default of a top-level `original_max_position_embeddings`, None where there is none
    unsaid       class default of everything, None where it is no scaling
    truncate     class default of yarn's `truncate`: whether the ends of its ramp are whole numbers. llama.cpp knows no
                 other, so that where this is False it computes slightly different angles (docs/formats.md)
    """

    kinds: tuple[str, ...]
    theta: float = 10000.0
    theta_name: str = "rope_theta"
    partial: float | None = None
    partial_name: str = "partial_rotary_factor"
    original: int | None = None
    unsaid: Mapping[str, Any] | None = None
    truncate: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Frequency factors."""
        llama3 = (FREQS,) if "llama3" in self.kinds else ()
        return (*llama3, LONG, SHORT) if "longrope" in self.kinds else llama3

    def metadata(self, facts: Facts, dims: Dims) -> dict[str, Any]:
        """Base, rotated width and scaling. Raises ModelError for a scaling that the graph does not have."""
        rope = self._parameters(facts)
        keys: dict[str, Any] = {
            "rope.freq_base": _needed(rope, "rope_theta"),
            "rope.dimension_count": self._rotated(rope, dims),
        }
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
            return keys | _yarn_keys(rope, facts, self.truncate)
        if kind == "longrope" and not self._is_one_set(rope, facts):
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
        if self._is_one_set(rope, facts):
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
            if not self.truncate:
                rope["truncate"] = bool(stored.get(TRUNCATE, False))
        elif kind in (None, "linear") and factor and factor != 1:
            rope |= {"rope_type": "linear", "factor": float(factor)}
        return {"rope_parameters": rope} | (
            {} if self.original is None else {"original_max_position_embeddings": original}
        )

    def _is_one_set(self, rope: dict[str, Any], facts: Facts) -> bool:
        """Whether LongRoPE has the same factors at every length and can be written as Llama 3's are."""
        same = _needed(rope, "long_factor") == _needed(rope, "short_factor")
        return same and "llama3" in self.kinds and _longrope_attention(rope, facts) == 1.0

    def _parameters(self, facts: Facts) -> dict[str, Any]:
        rope = dict(facts.get("rope_scaling") or facts.get("rope_parameters") or self.unsaid or {})
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
        keys: dict[str, Any] = {
            "rope.freq_base": _needed(full, "rope_theta"),
            "rope.freq_base_swa": _needed(local, "rope_theta"),
        }
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


def _yarn_keys(rope: Mapping[str, Any], facts: Facts, usual: bool) -> dict[str, Any]:
    """usual: what `truncate` is in this architecture. False is accepted only where it is."""
    original = _original(rope, facts)
    factor = rope.get("factor") or facts["max_position_embeddings"] / original
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    truncate = rope.get("truncate", True)
    if (fast, slow) != (32, 1) or not (truncate or not usual):
        raise ModelError(
            f"config.json: yarn with beta_fast {fast}, beta_slow {slow}, truncate {truncate}; "
            "llama.cpp has 32, 1 and true in this graph."
        )
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = _yarn_attention(factor, rope["mscale"]) / _yarn_attention(factor, rope["mscale_all_dim"])
    keys: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(factor),
        "rope.scaling.original_context_length": int(original),
    }
    if truncate and not usual:
        keys[TRUNCATE] = True
    extra = 1.0 if attention is None else attention / _yarn_attention(factor)  # llama.cpp has the usual one built in
    return keys if abs(extra - 1) < 1e-6 else keys | {"rope.scaling.attn_factor": float(extra)}


def _needed(rope: Mapping[str, Any], name: str) -> Any:
    value = rope.get(name)
    if isinstance(value, int | float) and value > 0:
        return float(value)
    if isinstance(value, list) and all(isinstance(entry, int | float) and entry > 0 for entry in value):
        return value
    raise ModelError(f"config.json: rope parameters have {name} {value!r}; it must be positive.")


def _vector(name: str, values: list[float], n: int) -> Extra:
    if len(values) != n:
        raise ModelError(f"config.json: {len(values)} rope factors for {n} rotary frequencies.")
    return Extra(name, (n,), lambda: torch.tensor(values, dtype=torch.float32))
