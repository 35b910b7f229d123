"""A run on an importance matrix: no model is computed, every tensor is rounded for the mean squares in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from whit.calibration.moments import Moments
from whit.checkpoints.imatrix import ImportanceMatrix
from whit.errors import ModelError
from whit.pipeline.plain import plain_pieces
from whit.pipeline.plan import Piece, Plan, Rounded, Step
from whit.pipeline.rounder import Rounder, Task

Progress = Callable[[int, int, str], None]


def imported_tensors(
    plan: Plan, matrix: ImportanceMatrix, rounder: Rounder, progress: Progress | None
) -> Iterator[Rounded]:
    """Every tensor in file order.

    Raises ModelError when an entry of the matrix has another shape than its tensor.
    """
    total, done = sum(step.n_bytes for step in plan.steps), 0
    for step in plan.steps:
        if progress:
            progress(done, total, step.tensor.name)
        yield step, _pieces(step, matrix, rounder)
        done += step.n_bytes
    if progress:
        progress(total, total, "done")


def _pieces(step: Step, matrix: ImportanceMatrix, rounder: Rounder) -> Iterator[Piece]:
    if not step.needs_moments:
        yield from plain_pieces(step)
        return
    yield from rounder.rounded([Task(step, _moments(step, matrix))])
    rounder.forget()


def _moments(step: Step, matrix: ImportanceMatrix) -> list[Moments | None]:
    name, shape = step.tensor.name, step.tensor.shape
    n = shape[0] if len(shape) == 3 else 1
    if name not in matrix.means:
        return [None] * n
    means, counts = matrix.means[name], matrix.counts[name]
    if tuple(means.shape) != (n, shape[-1]):
        found = " x ".join(map(str, means.shape))
        raise ModelError(
            f"The importance matrix has {found} numbers for {name}, the model needs {n} x {shape[-1]}: "
            "it was made from another model."
        )
    return [
        Moments.of_importance(mean, int(count)) if count else None
        for mean, count in zip(means, counts.tolist(), strict=True)
    ]
