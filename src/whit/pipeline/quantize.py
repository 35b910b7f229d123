"""The main job: a model in, a GGUF file out, one tensor in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.checkpoints.atomic import check_target, whole_file
from whit.checkpoints.gguf import Announced, GGUFWriter
from whit.checkpoints.imatrix import ImportanceMatrix
from whit.checkpoints.stacked import METHOD, StackedTensors
from whit.devices import CPU
from whit.errors import ModelError
from whit.grids.quantized import QuantizedTensor
from whit.layouts.ggml import GGML_TYPES
from whit.models.architecture import GGUFView, gguf_view, passthrough_view
from whit.models.links import Links
from whit.models.model import Model
from whit.models.vocabulary import gguf_vocabulary
from whit.pipeline.effort import Calibration, TensorLoss
from whit.pipeline.forecast import within
from whit.pipeline.imported import imported_tensors
from whit.pipeline.job import Job
from whit.pipeline.plain import plain_tensors
from whit.pipeline.plan import FILE_TYPES, Piece, Plan, Rounded, Step, make_plan
from whit.pipeline.rounder import Rounder
from whit.pipeline.state import state_beside
from whit.recipes.recipe import Recipe

Progress = Callable[[int, int, str], None]  # bytes of output done, bytes in all, what is being worked on
Watch = Callable[[str, QuantizedTensor], None]


@dataclass(frozen=True)
class Result:
    """What was written.

    path, n_bytes  the file and its size
    plan           what every tensor became, with the reasons for exceptions
    seconds        wall time
    losses         what each calibrated tensor lost, in the order in which they were rounded
    """

    path: Path
    n_bytes: int
    plan: Plan
    seconds: float
    losses: tuple[TensorLoss, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file per weight, metadata and tokenizer included."""
        return 8 * self.n_bytes / self.plan.n_weights


def write_gguf(
    model: Model,
    recipe: Recipe,
    path: Path,
    overwrite: bool = False,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    tensors: Callable[[Plan], Iterable[Rounded]] | None = None,
    watch: Watch | None = None,
) -> Result:
    """Quantize `model` by `recipe` into a GGUF file at `path`.

    tensors  makes what every step becomes, when nothing is to be rounded here
    watch    is shown every piece that is packed, and the name of its tensor
    calibration  text and effort; needed when a rounding of the recipe looks at what arrives at a layer
    Raises ModelError for weights or tokenizers that cannot be used, OutputError when the file exists (without
    `overwrite`) or cannot be written. On any failure nothing is left at `path` that was not there before; what a
    calibrated run has finished lies beside it, and the same call goes on there (pipeline/state.py).
    """
    started = time.perf_counter()
    plan = plan_gguf(model, recipe)
    writer = _writer(model, plan)
    check_target(path, writer.n_bytes, overwrite)
    with (
        state_beside(path, model, plan.steps, None if tensors else calibration) as state,
        whole_file(path, writer.n_bytes, overwrite) as file,
    ):
        losses: list[TensorLoss] = []
        if tensors is not None:
            writer.write(file, _packed(tensors(plan), watch))
        elif not any(step.needs_moments for step in plan.steps):
            writer.write(file, _packed(plain_tensors(plan.steps, progress), watch))
        elif calibration is None:
            raise ValueError(f"recipe {recipe.name} needs a calibration text")
        elif calibration.importance is not None:
            rounder = Rounder(calibration.effort)
            writer.write(file, _packed(imported_tensors(plan, calibration.importance, rounder, progress), watch))
            losses = rounder.losses
        else:
            from whit.pipeline.calibrated import CalibratedRun  # it imports transformers, which takes seconds

            calibration = within(model, plan, calibration, path.parent)
            Job(recipe, calibration).offer()
            streamed = CalibratedRun(model, model_view(model), plan.steps, calibration, progress, state=state)
            writer.write(file, _packed(streamed.tensors(), watch))
            losses = streamed.rounder.losses
    return Result(path, writer.n_bytes, plan, time.perf_counter() - started, tuple(losses))


def plan_gguf(model: Model, recipe: Recipe) -> Plan:
    """What `write_gguf` would do, from headers alone."""
    source, view = model.gguf_tensors, model_view(model)
    if isinstance(model.tensors, StackedTensors):
        return make_plan(view, recipe, _stacks(view, model.tensors))

    def stored(name: str, kind: str) -> Callable[[], Tensor] | None:
        if source is None or source.info(name).dtype != kind:
            return None
        return lambda: source.raw(name)

    return make_plan(view, recipe, stored)


def _stacks(view: GGUFView, source: StackedTensors) -> Callable[[str, str], Callable[[], Tensor] | None]:
    """Readers of experts that the source has in GGML's MXFP4 but for the order of their weights."""
    links = Links(view)
    homes = {gguf: name for name in links.disk_names() if source.is_quantized(name) for gguf in links.sources(name)}

    def stored(name: str, kind: str) -> Callable[[], Tensor] | None:
        if name not in homes or kind.lower() != METHOD:
            return None
        ways = links.sources(homes[name])
        return lambda: source.ggml(homes[name], ways.index(name), len(ways))

    return stored


def gather_importance(
    model: Model, windows: Tensor, source: str, progress: Progress | None = None, device: torch.device = CPU
) -> ImportanceMatrix:
    """The mean squared inputs of every matrix of a model on calibration windows [n, length] int64.

    source  what the text is
    device  where the model runs
    """
    from whit.pipeline.observe import importance_matrix  # it imports transformers, which takes seconds

    return importance_matrix(model, model_view(model), windows, source, progress, device)


def predicted_bytes(model: Model, recipe: Recipe) -> int:
    """The exact size of the file that `write_gguf` would write."""
    return _writer(model, plan_gguf(model, recipe)).n_bytes


def model_view(model: Model) -> GGUFView:
    """The model's tensors and metadata as a GGUF file has them."""
    if model.gguf_tensors is not None:
        return passthrough_view(model.gguf_metadata, model.gguf_tensors)
    return gguf_view(model)


def _writer(model: Model, plan: Plan) -> GGUFWriter:
    metadata = {**_general(model, plan), **plan.metadata, **_vocabulary(model)}
    metadata |= {"general.file_type": _file_type(plan), "general.quantization_version": 2, **_provenance(plan)}
    announced = [Announced(step.tensor.name, step.tensor.shape, step.type) for step in plan.steps]
    return GGUFWriter(metadata, announced, model.gguf_types)


def _general(model: Model, plan: Plan) -> dict[str, Any]:
    """Name and size; overridden by what a GGUF source says of itself."""
    name = model.config.get("_name_or_path") or Path(model.label).name
    return {"general.type": "model", "general.name": name, "general.size_label": _size_label(plan.n_weights)}


def _provenance(plan: Plan) -> dict[str, Any]:
    return {"general.quantized_by": f"Whit {version('whit')}", "whit.recipe": str(plan.recipe)}


def _vocabulary(model: Model) -> dict[str, Any]:
    if model.gguf_metadata:
        return {key: value for key, value in model.gguf_metadata.items() if key.startswith("tokenizer.")}
    if model.tokenizer_dir is None:
        raise ModelError(f"{model.label}: has no tokenizer, and a GGUF file needs one.")
    return gguf_vocabulary(model.tokenizer_dir, model.config)


def _file_type(plan: Plan) -> int:
    """The number of the type that most weights have; one field cannot say more."""
    share: dict[str, int] = {}
    for step in plan.steps:
        share[step.type.lower()] = share.get(step.type.lower(), 0) + step.tensor.n_weights
    named = plan.recipe.name if plan.recipe.name in FILE_TYPES else max(share, key=lambda name: share[name])
    return FILE_TYPES[named]


def _packed(tensors: Iterable[Rounded], watch: Watch | None) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Names and pieces of bytes."""
    for step, pieces in tensors:
        yield step.tensor.name, _bytes(step, pieces, watch)


def _bytes(step: Step, pieces: Iterator[Piece], watch: Watch | None) -> Iterator[Tensor]:
    for piece in pieces:
        if watch is not None and isinstance(piece, QuantizedTensor):
            watch(step.tensor.name, piece)
        yield piece if isinstance(piece, Tensor) else GGML_TYPES[step.type].pack(piece)


def _size_label(n_weights: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n_weights >= size:
            return f"{n_weights / size:.3g}{unit}"
    return str(n_weights)
