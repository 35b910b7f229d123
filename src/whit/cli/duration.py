"""How long `whit quantize` and `whit tune` would take: their options as work, and the machine timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from whit.cli.progress import progress_bar
from whit.cli.tune import RESAMPLED
from whit.errors import WhitError
from whit.models.model import Model
from whit.pipeline.counts import Text, job_work
from whit.pipeline.duration import Cost, Times
from whit.pipeline.effort import PRESETS
from whit.pipeline.plan import Plan
from whit.pipeline.quantize import model_view
from whit.pipeline.speed import Machine


def times(
    model: Model, jobs: Sequence[tuple[Plan, int]], preset: str, text: Text, looked: int | None, out: Path
) -> list[Times]:
    """How long each job takes here.

    jobs    plans, and the bytes of what they write
    looked  windows that the verdict reads, None for no verdict
    preset, out  as for `whit quantize`
    """
    start = Cost(time.time() - psutil.Process().create_time(), time.process_time())
    work, view = PRESETS[preset], model_view(model)
    place = next(each for each in (out.absolute(), *out.absolute().parents) if each.is_dir())
    found: list[Times] = []
    with progress_bar("timing this machine") as progress:
        try:
            machine = Machine(model, view, text.length, start)
        except WhitError as error:
            return [Times({}, 0, str(error))] * len(jobs)
        for n, (plan, n_bytes) in enumerate(jobs):
            progress(n, len(jobs), plan.recipe.name)
            try:
                job = job_work(plan, n_bytes, text, work, machine.survey, looked)
                threads = torch.get_num_threads()
                found.append(Times(job.cost(machine.laws(job, work.effort, place), threads), threads))
            except WhitError as error:
                found.append(Times({}, 0, str(error)))
        progress(len(jobs), len(jobs), "done")
    return found


def tune_times(
    model: Model, jobs: Sequence[Plan], quantizing: Sequence[Times], length: int, windows: int, held_out: int
) -> list[Times]:
    """How long it takes here to train each file as `whit tune` does, what comes before included.

    quantizing  how long that takes, of each
    windows     of `length` tokens to train on, and held_out to decide on
    """
    from whit.tune.speed import tuning_laws, tuning_work
    from whit.tune.train import Tuning

    tuning, threads, found = Tuning(), torch.get_num_threads(), list[Times]()
    with progress_bar("timing steps of training") as progress:
        for n, (plan, before) in enumerate(zip(jobs, quantizing, strict=True)):
            progress(n, len(jobs), plan.recipe.name)
            if before.why:
                found.append(before)
                continue
            try:
                laws = tuning_laws(model, plan, tuning, length, RESAMPLED)
                work = tuning_work(plan, tuning, windows, held_out, RESAMPLED)
                parts = {"quantizing": before.total, **work.cost(laws, threads)}
                found.append(Times(dict(sorted(parts.items(), key=lambda each: -each[1].wall)), threads))
            except WhitError as error:
                found.append(Times({}, 0, str(error)))
        progress(len(jobs), len(jobs), "done")
    return found
