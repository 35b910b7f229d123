"""What all ranks but the first do: the calibrated runs that the first asks for, up to the writing."""

from __future__ import annotations

import torch

from whit.devices import CPU
from whit.models.model import Model
from whit.pipeline.calibrated import CalibratedRun
from whit.pipeline.folder import FolderJob
from whit.pipeline.job import offered
from whit.pipeline.quantize import model_view, plan_gguf
from whit.ranks import Ranks


def help_with(model: Model, ranks: Ranks, device: torch.device = CPU) -> None:
    """Work until the first rank has no more jobs. Raises what `CalibratedRun` raises, and RankError."""
    while (job := offered(ranks, device)) is not None:
        if job.recipe.layout == "gguf":
            plan, activations = plan_gguf(model, job.recipe), ""
        else:
            plan, activations = FolderJob(model, job.recipe, job.dtype).plan, job.recipe.activations
        run = CalibratedRun(model, model_view(model), plan.steps, job.calibration, None, activations)
        for _, pieces in run.tensors():
            for _ in pieces:
                pass
