"""What was replaced in a live model and what was left alone, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """A module that has a twin.

    name          in the model
    twin          its class
    weights       the grid, empty for norms
    activations   how what arrives (for norms: what leaves) is quantized, empty for not at all
    n_parameters  of its matrix; 0 when it is tied to one that is named before
    note          what is not as it was asked for, else empty
    """

    name: str
    twin: str
    weights: str
    activations: str
    n_parameters: int
    note: str = ""


@dataclass(frozen=True)
class Left:
    """A module that keeps its float parameters."""

    name: str
    kind: str
    n_parameters: int
    reason: str


@dataclass(frozen=True)
class Report:
    """Printed, it is a table.

    total  parameters of the model, biases and norms included, shared ones once
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    total: int

    @property
    def share(self) -> float:
        """Share of all parameters, shared ones once, that these layers put on a grid."""
        return sum(each.n_parameters for each in self.replaced if each.weights) / max(1, self.total)

    def __str__(self) -> str:
        rows = Counter[tuple[str, str, str, str]]()
        sizes = Counter[tuple[str, str, str, str]]()
        for each in self.replaced:
            key = each.twin, each.weights or "float", each.activations or "float", each.note
            rows[key] += 1
            sizes[key] += each.n_parameters
        lines = [f"{self.share:.1%} of the parameters on a grid"]
        for (twin, weights, activations, note), n in rows.items():
            size = sizes[twin, weights, activations, note]
            line = f"  {n:4d} {twin:12s} weights {weights:16s} activations {activations:6s} {size:13,d} parameters"
            lines.append(f"{line}   {note}".rstrip())
        reasons = Counter[tuple[str, str]]()
        left = Counter[tuple[str, str]]()
        for one in self.left:
            reasons[one.kind, one.reason] += 1
            left[one.kind, one.reason] += one.n_parameters
        if reasons:
            lines.append("left in float:")
        for (kind, reason), n in reasons.items():
            lines.append(f"  {n:4d} {kind:12s} {left[kind, reason]:13,d} parameters   {reason}")
        return "\n".join(lines)
