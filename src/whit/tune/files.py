"""A quantized file trained further, and written in the format that it had: `whit tune`.

The file becomes a live model whose matrices hold the very codes of the file (live/checkpoint.py); what
has been trained goes back the same way: by transformers' names to weights on disk, by the two-way tables to GGUF's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from whit.checkpoints.atomic import check_folder, check_target, whole_file
from whit.checkpoints.source import TensorInfo, TensorSource
from whit.devices import CPU
from whit.grids.quantized import QuantizedTensor
from whit.live.checkpoint import live_model, matrices_of, without_inner
from whit.live.learner import Learner
from whit.live.twin import Twin
from whit.models.architecture import gguf_view, head_name
from whit.models.links import Links
from whit.models.model import Model
from whit.pipeline.quantize import model_view
from whit.pipeline.rewrite import check_pair, folder_job, rewrite_folder, rewrite_gguf
from whit.pipeline.stored import gathered, joined, stored_of
from whit.tune.moving import learn, settle, vectors_of
from whit.tune.state import Keeper
from whit.tune.teacher import Progress, Teacher
from whit.tune.train import Run, Tuned, Tuning, training_mode

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tune_file(
    candidate: Model,
    path: Path,
    windows: Tensor,
    held_out: Tensor,
    original: Model | None = None,
    tuning: Tuning | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> Tuned:
    """Train a quantized GGUF file or folder and write it to `path`: same format, same types, same size.

    windows, held_out  [n, length] int64, token ids that do not overlap
    original  the float model to follow; None to learn to predict the next token
    device    where the models are trained; the file is read and written on the CPU
    A run that was interrupted goes on where it was, with the same arguments, and ends with the same bytes, if it is
    gone on with on a device of the same kind.
    Raises ModelError when the candidate is not quantized or of another model, OutputError as the writers do.
    """
    tuning = tuning or Tuning()
    check_pair(original, candidate)
    stored = stored_of(candidate)
    job = None if candidate.gguf_tensors is not None else folder_job(candidate, stored)
    if job is not None:
        check_folder(path, job.n_bytes, overwrite)
    else:
        check_target(path, candidate.n_bytes, overwrite)
    model = live_model(candidate, torch.float32)
    learners = learn(model, tuning.train, tuning.rank, tuning.seed, tuning.by_blocks(original is not None))
    keeper = Keeper(path, _fingerprint(learners, original, windows, held_out, tuning))
    back = _Back(candidate, model)
    types = dict.fromkeys(vectors_of(model), job.dtype) if job is not None else back.types()
    model.to(device)
    run = Run(model, learners, torch.cat([held_out, windows]), len(held_out), tuning, types)
    keeper.restore(run)
    teacher = (
        None if original is None else Teacher(live_model(original, torch.float32).to(device), run.ids, len(held_out))
    )
    with training_mode(model, tuning.checkpoints):
        found = run.train(teacher, progress, keeper.save)
    settle(model.to(CPU))
    changes = back if found.changed else None
    if job is not None:
        rewrite_folder(job, stored, path, overwrite, changes)
    else:
        assert candidate.gguf_tensors is not None
        with whole_file(path, candidate.gguf_tensors.n_bytes, overwrite) as file:
            rewrite_gguf(candidate.gguf_tensors, file, changes)
    keeper.done()
    return found


def _fingerprint(
    learners: Sequence[Learner], original: Model | None, windows: Tensor, held_out: Tensor, tuning: Tuning
) -> dict[str, str]:
    """What must be the same for a state to be gone on from, by what a person calls it."""
    settings = {name: value for name, value in asdict(tuning).items() if name != "minutes"}
    codes = [each for learner in learners for each in (learner.codes, *learner.stored.tensors.values())]
    return {
        "version of Whit": version("whit"),
        "file": _digest(codes),
        "teacher": json.dumps(None if original is None else [original.label, original.n_bytes]),
        "text": _digest([windows, held_out]),
        "settings": json.dumps(settings, sort_keys=True),
    }


def _digest(tensors: Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for each in tensors:
        found.update(each.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


class _Back:
    """What a settled live model holds, as changes to the file that it came from."""

    def __init__(self, candidate: Model, model: nn.Module) -> None:
        self._candidate, self._links = candidate, Links(model_view(candidate))
        self._twins: dict[str, tuple[Twin, slice]] = {}  # weight on disk -> the matrix it is rows of
        self._vectors: dict[str, tuple[nn.Parameter, slice]] = {}
        for name, module in model.named_modules():
            for (parameter, expert), twin in matrices_of(name, module):
                self._place(self._homes(model, module, parameter, expert), twin)
        for name, vector in vectors_of(model).items():
            homes = self._links.homes(without_inner(name))
            if homes:
                at = 0
                for home in homes[0]:
                    n = self._links.disk_shape(home)[0]
                    self._vectors[home] = vector, slice(at, at + n)
                    at += n
        self._moving: dict[str, list[str]] = {}
        for home in (*self._twins, *self._vectors):
            self._moving.setdefault(self._links.source(home)[0], []).append(home)
        self._names = {id(vector): name for name, vector in vectors_of(model).items()}

    def moving(self) -> Sequence[str]:
        """Tensors with other values."""
        return list(self._moving)

    def moved(self, name: str) -> QuantizedTensor | Tensor:
        """One of them."""
        homes = self._moving[name]
        if homes[0] in self._vectors:
            return self._floats()[name]
        experts: dict[int, list[tuple[Tensor, Tensor, QuantizedTensor]]] = {}
        for home in homes:
            twin, own = self._twins[home]
            rows, factor = self._links.disk_rows(home)
            experts.setdefault(self._links.source(home)[1], []).append((rows, factor, _rows(twin.quantized(), own)))
        return joined([gathered(experts[expert]) for expert in sorted(experts)])

    def types(self) -> dict[str, torch.dtype]:
        """What every vector of the model is stored as."""
        info = self._candidate.gguf_tensors.info if self._candidate.gguf_tensors is not None else None
        found = {}
        for home, (vector, _) in self._vectors.items():
            if info is not None:
                found[self._names[id(vector)]] = FLOATS.get(info(self._links.source(home)[0]).dtype, torch.float32)
        return found

    def _homes(self, model: nn.Module, module: nn.Module, parameter: str, expert: int) -> list[str]:
        """The weights on disk that a matrix is made of, none for a head that is tied to the embedding."""
        homes = self._links.homes(parameter)
        if not homes and module is model.get_output_embeddings():  # type: ignore[operator]
            homes = self._links.homes(head_name(self._candidate.config))
        return homes[expert] if homes else []

    def _place(self, homes: Sequence[str], twin: Twin) -> None:
        at = 0
        for home in homes:
            n = self._links.disk_rows(home)[0].numel()
            self._twins.setdefault(home, (twin, slice(at, at + n)))
            at += n

    def _floats(self) -> Mapping[str, Tensor]:
        """All vectors that move, as a GGUF file has them."""
        changed = {home: vector.detach().float()[own] for home, (vector, own) in self._vectors.items()}
        source = _Overlay(self._candidate.tensors, changed)
        view = gguf_view(replace(self._candidate, tensors=source, gguf_tensors=None))
        return {
            tensor.name: tensor.read().float()
            for tensor in view.tensors
            if tensor.name in self._moving and len(tensor.shape) == 1
        }


class _Overlay:
    """A source in which some tensors have other values."""

    def __init__(self, source: TensorSource, changed: Mapping[str, Tensor]) -> None:
        self._source, self._changed = source, changed

    def names(self) -> Sequence[str]:
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str) -> Tensor:
        return self._changed[name] if name in self._changed else self._source.read(name)


def _rows(matrix: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Some rows of a matrix."""
    n = len(range(*rows.indices(matrix.shape[0])))
    own = [name for name, each in matrix.params.items() if each.dim() > 1 and each.shape[0] == matrix.shape[0]]
    params = {name: each[rows] if name in own else each for name, each in matrix.params.items()}
    return QuantizedTensor(matrix.grid, (n, matrix.shape[1]), matrix.codes[rows], params)
