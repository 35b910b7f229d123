"""How much work a run does, on which text, and what it reports of every tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from whit.checkpoints.imatrix import ImportanceMatrix
from whit.devices import CPU
from whit.pipeline.statistics import Statistics
from whit.ranks import ALONE, Ranks
from whit.rounding.methods import Effort


@dataclass(frozen=True)
class Preset:
    """A named amount of work.

    windows   of 512 calibration tokens
    text      what they are when nothing is said: `docs`, or `mixed` with text that the model writes, which takes longer
    strength  how much of the earlier layers' errors each target makes up for, 0 for none, 1 for all
    effort    of the rounding itself
    """

    windows: int
    text: str
    strength: float
    effort: Effort


PRESETS = {
    "fast": Preset(8, "docs", 0.0, Effort(sweeps=1)),
    "balanced": Preset(48, "mixed", 0.0, Effort(sweeps=3)),
    "best": Preset(160, "mixed", 0.0, Effort(sweeps=8)),
}
DEFAULT_PRESET = "balanced"


@dataclass(frozen=True)
class Calibration:
    """Text and effort, and who works on it.

    windows     [n, length] int64 token ids
    strength    how much of the earlier layers' errors each target makes up for, 0 for none, 1 for all
    effort      of the rounding itself
    source      what the text is, for reports
    importance  what arrives at the layers, instead of windows
    statistics  moments of the original model on the windows, gathered before: no block is run again
    ranks       the processes that share the work; the result is the same whatever they are
    device      where this one runs the model
    ram         bytes that the process may take, None for what it needs; kept by writing hidden states to disk
    spill       the folder on whose disk they go, None to hold them in memory
    """

    windows: Tensor
    strength: float = 0.0
    effort: Effort = field(default_factory=Effort)
    source: str = ""
    importance: ImportanceMatrix | None = None
    statistics: Statistics | None = None
    ranks: Ranks = ALONE
    device: torch.device = CPU
    ram: int | None = None
    spill: Path | None = None

    @classmethod
    def on_importance(cls, importance: ImportanceMatrix, effort: Effort, source: str) -> Calibration:
        """No text: an importance matrix."""
        return cls(torch.empty(0, 0, dtype=torch.int64), 0.0, effort, source, importance)


@dataclass(frozen=True)
class TensorLoss:
    """What one tensor lost: E = sum of (Q - W) H (Q - W)^T under its own damped H.

    loss      as written
    plain     with plain rounding
    n_tokens  calibration tokens that reached it, of which n_lost were dropped as NaN or infinite
    n_dead    inputs that were always zero
    note      what was unusual, else empty
    """

    name: str
    kind: str
    rounding: str
    loss: float
    plain: float
    n_tokens: int
    n_lost: int
    n_dead: int
    note: str = ""
