"""A quantized file written again in its own format, with other values in some tensors: same types, same size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from whit.checkpoints.gguf import GGUFFile
from whit.errors import ModelError
from whit.grids.quantized import QuantizedTensor
from whit.layouts.ggml import GGML_TYPES
from whit.models.activations import input_schemes
from whit.models.model import Model
from whit.pipeline.convert import same_recipe
from whit.pipeline.folder import FolderJob
from whit.pipeline.plain import plain_pieces
from whit.pipeline.plan import Piece, Plan, Rounded, Step
from whit.pipeline.quantize import model_view
from whit.pipeline.stored import Stored, split_rows
from whit.rounding.nearest import nearest


class Changes(Protocol):
    """What is other than in the file, under GGUF names and in GGUF's order of rows."""

    def moving(self) -> Sequence[str]:
        """The tensors with other values."""
        ...

    def moved(self, name: str) -> QuantizedTensor | Tensor:
        """One of them: all rows of all its matrices on the grid of the file, or a float32 vector."""
        ...


def rewrite_gguf(source: GGUFFile, file: BinaryIO, changes: Changes | None) -> None:
    """A copy of `source` with changes, or none."""
    source.with_changes(file, () if changes is None else _packed(source, changes))


def folder_job(candidate: Model, stored: Stored) -> FolderJob:
    """What writes a quantized folder in its own format again. Raises as FolderJob does."""
    floats = {candidate.tensors.info(name).dtype for name in candidate.tensors.names()}
    dtype = torch.float32 if "F32" in floats and not floats & {"F16", "BF16"} else None
    return FolderJob(candidate, same_recipe(candidate, stored), dtype)


def rewrite_folder(job: FolderJob, stored: Stored, path: Path, overwrite: bool, changes: Changes | None) -> None:
    """The folder of `stored` with changes, or none. Raises OutputError."""
    job.write(path, overwrite, tensors=_pieces(job.plan, stored, changes))


def check_pair(original: Model | None, candidate: Model) -> None:
    """Raise ModelError, from headers alone, when `candidate` is not quantized or not of `original`."""
    if candidate.gguf_tensors is None and not candidate.quantization:
        raise ModelError(f"{candidate.label}: it is not a quantized file or folder, so nothing in it can be trained.")
    if input_schemes(candidate):
        raise ModelError(f"{candidate.label}: its activations are quantized too, which training does not follow.")
    if original is None:
        return
    theirs = {tensor.name: tensor.shape for tensor in model_view(original).tensors}
    for tensor in model_view(candidate).tensors:
        if theirs.get(tensor.name) != tensor.shape:
            raise ModelError(
                f"{candidate.label} is not of {original.label}: {tensor.name} is {list(tensor.shape)} in one and "
                f"{list(theirs.get(tensor.name, ())) or 'missing'} in the other."
            )


def _packed(source: GGUFFile, changes: Changes) -> Iterator[tuple[str, Tensor]]:
    """Names and flat bytes of what is other."""
    for name in changes.moving():
        moved, kind = changes.moved(name), GGML_TYPES[source.info(name).dtype]
        yield name, kind.pack(nearest(moved[None], kind.grid) if isinstance(moved, Tensor) else moved)


def _pieces(plan: Plan, stored: Stored, changes: Changes | None) -> Iterator[Rounded]:
    for step in plan.steps:
        yield step, _of_step(step, stored, changes)


def _of_step(step: Step, stored: Stored, changes: Changes | None) -> Iterator[Piece]:
    name = step.tensor.name
    moved = changes.moved(name) if changes is not None and name in changes.moving() else None
    if isinstance(moved, QuantizedTensor):
        yield from split_rows(moved, step.tensor.shape[0] if len(step.tensor.shape) == 3 else 1)
    elif isinstance(moved, Tensor):
        yield nearest(moved[None], step.grid)
    elif (matrices := stored.matrices(name)) is not None:
        yield from matrices
    else:
        yield from plain_pieces(step)
