"""What the first rank of a run tells the others, so that they go through the same steps without writing anything."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from whit.pipeline.effort import Calibration
from whit.ranks import Ranks
from whit.recipes.recipe import Recipe, Rule
from whit.rounding.methods import Effort

WINDOWS = "windows"


@dataclass(frozen=True)
class Job:
    """One calibrated run.

    dtype  of what stays in float in a folder; None for GGUF files
    """

    recipe: Recipe
    calibration: Calibration
    dtype: torch.dtype | None = None

    def offer(self) -> None:
        """Tell the other ranks. Raises RankError when one has ended."""
        ranks, effort = self.calibration.ranks, asdict(self.calibration.effort)
        if ranks.size > 1:
            dtype = str(self.dtype).removeprefix("torch.") if self.dtype else None
            spill = str(self.calibration.spill.absolute()) if self.calibration.spill else None
            ranks.said([asdict(self.recipe), effort, self.calibration.strength, dtype, spill])
            ranks.given({WINDOWS: self.calibration.windows})


def offered(ranks: Ranks, device: torch.device) -> Job | None:
    """The next job of the first rank, to be done on a device of one's own; None when there are no more.

    Raises RankError when the first rank has ended.
    """
    said = ranks.said(None)
    if said is None:
        return None
    recipe, effort, strength, dtype, spill = said
    recipe = Recipe(**{**recipe, "rules": tuple(Rule(**rule) for rule in recipe["rules"])})
    windows, folder = ranks.given(None)[WINDOWS], Path(spill) if spill else None
    calibration = Calibration(windows, strength, Effort(**effort), ranks=ranks, device=device, spill=folder)
    return Job(recipe, calibration, getattr(torch, dtype) if dtype else None)


def dismiss(ranks: Ranks) -> None:
    """There are no more jobs."""
    ranks.said(None)
