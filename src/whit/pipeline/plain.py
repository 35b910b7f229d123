"""Roundings that need no calibration: one tensor after the other, in slices of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from whit.errors import BadWeightsError
from whit.models.architecture import GGUFTensor
from whit.pipeline.plan import Piece, Rounded, Step
from whit.rounding.named import rounding_named
from whit.rounding.nearest import in_one_pass, nearest, slices

Progress = Callable[[int, int, str], None]  # bytes of output done, bytes in all, what is being worked on
PIECE = 1 << 22  # weights that are rounded and packed at a time
AHEAD = 1 << 26  # weights at most in what is read while something else is rounded


def plain_tensors(steps: Sequence[Step], progress: Progress | None) -> Iterator[Rounded]:
    """Every tensor in file order; the next is read while the last one is rounded."""
    total, done = sum(step.n_bytes for step in steps), 0
    values = read_ahead(steps)
    for step in steps:
        if progress:
            progress(done, total, step.tensor.name)
        yield step, plain_pieces(step, values)
        done += step.n_bytes
    if progress:
        progress(total, total, "done")


def plain_pieces(step: Step, values: Iterator[Tensor] | None = None) -> Iterator[Piece]:
    """One tensor: one part per expert, each in slices of rows where rows share nothing.

    values  of `read_ahead`, when somebody reads for all tensors
    Raises BadWeightsError for weights that are not finite or that the type cannot hold.
    """
    values = values or (read() for read, _ in _reads(step))
    if step.stored is not None:
        yield next(values)
        return
    rounding = rounding_named(step.rounding)
    for _ in step.tensor.parts:
        W = next(values)
        if step.grid.row_independent:
            several = slices(W.reshape(-1, W.shape[-1]), PIECE)  # of [rows, cols]
        else:
            several = W.unbind(0) if W.dim() == 3 else [W]
        for rows in several:
            quick = in_one_pass(rows, step.grid) if rounding is nearest else None
            if quick is not None:  # then they are finite
                yield quick
                continue
            check_finite(step.tensor, rows, W)
            try:
                yield rounding(rows, step.grid)
            except OverflowError as error:
                raise too_large(step, error) from None


def read_ahead(steps: Sequence[Step]) -> Iterator[Tensor]:
    """What `plain_pieces` of every step will ask for, in order; the next is read while the last one is rounded."""
    reads = [each for step in steps for each in _reads(step)]
    with ThreadPoolExecutor(1) as pool:
        coming: Future[Tensor] | None = None
        for k, (read, _) in enumerate(reads):
            here = [read() if coming is None else coming.result()]
            small = k + 1 < len(reads) and reads[k + 1][1] <= AHEAD
            coming = pool.submit(reads[k + 1][0]) if small else None
            yield here.pop()  # nothing is held here while it is rounded


def _reads(step: Step) -> list[tuple[Callable[[], Tensor], int]]:
    """How to read the parts of a tensor, and the weights in each."""
    if step.stored is not None:
        return [(step.stored, step.tensor.n_weights)]
    return [(part.read, math.prod(part.shape)) for part in step.tensor.parts]


def too_large(step: Step, error: OverflowError) -> BadWeightsError:
    """The message for a scale that the type cannot hold."""
    return BadWeightsError(
        f"{step.tensor.name}: {error}, so {step.type} cannot hold it. Use bf16 or f32 for this tensor."
    )


def check_finite(tensor: GGUFTensor, rows: Tensor, W: Tensor) -> None:
    """Raise BadWeightsError when `rows` of W hold NaN or infinities; the message counts those in all of W."""
    low, high = rows.aminmax()  # one pass; NaN comes through
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        count = int((~torch.isfinite(W)).sum())
        raise BadWeightsError(
            f"{tensor.name}: {count} of {W.numel()} weights are NaN or infinite. The model is damaged; get it again."
        )
