"""The main job for runtimes of GPUs: a model in, a folder of quantized safetensors out.

Rounding works on the same matrices as for GGUF files, under the same names, so that recipes, sensitivities and
transforms are the same; what differs is where rows lie and what they are packed into. A layer of the folder is some
rows of one such matrix, in an order that the tables of known.py imply.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from whit.checkpoints.atomic import check_folder, whole_folder
from whit.checkpoints.quantized import CONFIG, WEIGHT
from whit.checkpoints.safetensors_writer import SHARD_BYTES, Shards
from whit.errors import BadWeightsError, RecipeError
from whit.grids.floats import Float
from whit.grids.grid import Spec
from whit.grids.quantized import QuantizedTensor
from whit.models.activations import INPUT_SCALE
from whit.models.architecture import head_name
from whit.models.links import Links
from whit.models.model import Model
from whit.pipeline.effort import Calibration, TensorLoss
from whit.pipeline.folder_plan import FLOATS, FolderPlanner
from whit.pipeline.forecast import within
from whit.pipeline.formats import FOLDERS, Said, has_zero_points
from whit.pipeline.job import Job
from whit.pipeline.plain import plain_tensors
from whit.pipeline.plan import Plan, Rounded, Step
from whit.pipeline.quantize import Progress, Result, Watch, model_view, plan_gguf, predicted_bytes, write_gguf
from whit.pipeline.state import state_beside
from whit.pipeline.stored import joined
from whit.recipes.folders import FIXED
from whit.recipes.recipe import Recipe

# What else belongs to a model: copied from the source folder as it is.
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json"),
    *("merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
EMBEDDING = "token_embd.weight"
MODULE = "lm_head"  # what transformers and vLLM call the head, whatever its name on disk


class FolderJob:
    """What a run writes; made from headers alone.

    plan     what every matrix becomes
    dtype    of what stays in float
    n_bytes  of the weight files, exactly
    """

    def __init__(self, model: Model, recipe: Recipe, dtype: torch.dtype | None = None) -> None:
        """dtype  of what stays in float; None for the model's own, or half precision.

        Raises RecipeError when the layout cannot hold what the recipe says, ModelError for unusable models."""
        self._model, self._form, self._recipe = model, FOLDERS[recipe.layout], recipe
        self._view = model_view(model)
        self._links = Links(self._view)
        self.dtype = dtype or _dtype(model)
        self._fixed = recipe.activations in FIXED
        self._homes: dict[str, list[str]] = {}  # GGUF tensor -> weights in the folder
        for name in self._links.disk_names():
            for gguf in self._links.sources(name):
                self._homes.setdefault(gguf, []).append(name)
        self._held: set[str] = set()  # GGUF tensors that share a weight of the folder with some that are to come
        self.plan = FolderPlanner(self._view, self._form, recipe, self.dtype, self._lies, self._stacked).plan()
        self._steps = {step.tensor.name: step for step in self.plan.steps}
        self._zero_points = any(has_zero_points(step.grid) for step in self.plan.steps)
        specs: dict[str, Spec] = {}
        for name in self._links.disk_names():
            specs |= self._specs(name)
        self._shards = Shards(specs, SHARD_BYTES)
        self.n_bytes = self._shards.n_bytes

    def write(
        self,
        path: Path,
        overwrite: bool = False,
        progress: Progress | None = None,
        calibration: Calibration | None = None,
        tensors: Iterable[Rounded] | None = None,
        watch: Watch | None = None,
    ) -> Result:
        """Quantize into a folder at `path`.

        tensors  what every step becomes, when nothing is to be rounded here
        watch    is shown every weight that is packed as codes, and its name in the folder
        Raises BadWeightsError and ModelError as `write_gguf` does, OutputError when the folder exists (without
        `overwrite`) or cannot be written. On any failure nothing is left at `path` that was not there before; what a
        calibrated run has finished lies beside it, and the same call goes on there (pipeline/state.py).
        """
        started, losses = time.perf_counter(), list[TensorLoss]()
        check_folder(path, self.n_bytes, overwrite)
        activations, given = self._recipe.activations, None if tensors is not None else calibration
        with (
            state_beside(path, self._model, self.plan.steps, given, f"{self._recipe.layout} {activations}") as state,
            whole_folder(path, self.n_bytes, overwrite) as folder,
        ):
            self._shards.create(folder)
            if tensors is not None:
                self._write(tensors, watch)
            elif self._fixed and (calibration is None or calibration.importance is not None):
                raise RecipeError(
                    "Fixed scales of activations are found on text: take a preset, or w8a8 and fp8 as such."
                )
            elif not any(step.needs_moments for step in self.plan.steps):
                self._write(plain_tensors(self.plan.steps, progress), watch)
            elif calibration is None or calibration.importance is not None:
                raise RecipeError("Folders for GPUs are rounded on text; an importance matrix is not enough.")
            else:
                from whit.pipeline.calibrated import CalibratedRun  # it imports transformers, which takes seconds

                steps = self.plan.steps
                calibration = within(self._model, self.plan, calibration, path.parent)
                Job(self._recipe, calibration, self.dtype).offer()
                run = CalibratedRun(self._model, self._view, steps, calibration, progress, activations, state)
                self._write(run.tensors(), watch, run.input_scales)
                losses = run.rounder.losses
            self._shards.close()
            self._beside(folder)
        return Result(path, self.n_bytes, self.plan, time.perf_counter() - started, tuple(losses))

    def _lies(self, gguf: str) -> bool:
        """Whether a matrix lies on its side in the folder, as transformers' Conv1D has it."""
        return any(self._links.lies(name) for name in self._homes.get(gguf, ()))

    def _stacked(self, gguf: str) -> bool:
        """Whether the folder has the matrices of all experts in one tensor."""
        return any(self._links.stacked(name) for name in self._homes.get(gguf, ()))

    def _specs(self, name: str) -> dict[str, Spec]:
        """What a weight of the folder is stored as."""
        step, shape = self._steps[self._links.source(name)[0]], self._links.disk_shape(name)
        if isinstance(step.grid, Float):
            return {name: Spec(shape, self.dtype)}
        matrix = (shape[1], shape[0]) if self._links.lies(name) else (shape[0], shape[1])
        layout, layer = self._form.layout(step.grid, bool(self._recipe.activations)), name.removesuffix(WEIGHT)
        refused = layout.refuses(step.grid, matrix)
        if refused:
            raise RecipeError(f"{name}: {refused}. Keep it in float with --keep '{step.tensor.name}=f16'.")
        specs = {f"{layer}.{suffix}": spec for suffix, spec in layout.schema(step.grid, matrix).items()}
        return specs | ({f"{layer}.{INPUT_SCALE}": Spec((1,), torch.float32)} if self._fixed else {})

    def _write(
        self, tensors: Iterable[Rounded], watch: Watch | None, input_scales: Mapping[str, float] | None = None
    ) -> None:
        for step, pieces in tensors:
            matrices = _matrices(step, [each for each in pieces if isinstance(each, QuantizedTensor)])
            if isinstance(step.grid, Float):
                self._write_floats(step, torch.cat([each.dequantize() for each in matrices]))
                continue
            layout = self._form.layout(step.grid, bool(self._recipe.activations), self._zero_points)
            for name in self._homes.get(step.tensor.name, ()):
                _, expert = self._links.source(name)
                matrix = rows_of(matrices[expert], *self._links.disk_rows(name))
                if watch is not None:
                    watch(name, matrix)
                parts = layout.pack(matrix)
                if input_scales is not None and self._fixed:
                    parts |= {INPUT_SCALE: torch.tensor([input_scales[step.tensor.name]])}
                for suffix, value in parts.items():
                    self._shards.write(f"{name.removesuffix(WEIGHT)}.{suffix}", value)

    def _write_floats(self, step: Step, W: Tensor) -> None:
        self._links.replace(step.tensor.name, W.view(step.tensor.shape))
        self._held.add(step.tensor.name)
        homes = self._homes.get(step.tensor.name, ())
        if not all(self._held.issuperset(self._links.sources(name)) for name in homes):
            return
        for name in homes:
            values = self._links.disk_read(name).to(self.dtype)
            if not torch.isfinite(values).all():
                raise BadWeightsError(f"{name}: a value does not fit {FLOATS[self.dtype]}.")
            self._shards.write(name, values)
        for gguf in {step.tensor.name, *(each for name in homes for each in self._links.sources(name))}:
            self._links.release(gguf)
            self._held.discard(gguf)

    def _beside(self, folder: Path) -> None:
        """config.json, tokenizer, generation settings."""
        grids, floats = {}, []
        for name in self._links.disk_names():
            step, layer = self._steps[self._links.source(name)[0]], name.removesuffix(WEIGHT)
            if not isinstance(step.grid, Float):
                grids[layer] = step.grid
            elif name.endswith(WEIGHT) and len(self._links.disk_shape(name)) == 2 and step.tensor.name != EMBEDDING:
                floats.append(layer)
        heads = tuple(dict.fromkeys((head_name(self._model.config).removesuffix(WEIGHT), MODULE)))
        said = Said(grids, floats, heads, self._recipe.activations)
        config = {key: value for key, value in self._model.config.items() if key not in ("torch_dtype", "dtype")}
        config |= {"dtype": DTYPES[self.dtype]}
        if grids:
            config[CONFIG] = self._form.config(said)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (source := self._model.tokenizer_dir) is None:
            from whit.models.tokenizer import save_tokenizer  # it imports transformers, which takes seconds

            save_tokenizer(self._model, folder)
            return
        for name in BESIDE:
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())


def plan_model(model: Model, recipe: Recipe) -> tuple[Plan, int]:
    """What `write_model` would do, and the exact bytes of its weight files, from headers alone."""
    if recipe.layout == "gguf":
        return plan_gguf(model, recipe), predicted_bytes(model, recipe)
    job = FolderJob(model, recipe)
    return job.plan, job.n_bytes


def write_model(
    model: Model,
    recipe: Recipe,
    path: Path,
    overwrite: bool = False,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    watch: Watch | None = None,
) -> Result:
    """Quantize `model` by `recipe` into the GGUF file or the folder that it is for. Raises what the writers raise.

    watch  as the writers take it
    """
    if recipe.layout == "gguf":
        return write_gguf(model, recipe, path, overwrite, progress, calibration, watch=watch)
    return FolderJob(model, recipe).write(path, overwrite, progress, calibration, watch=watch)


def _dtype(model: Model) -> torch.dtype:
    """bfloat16 for a model that is stored so, else half precision."""
    stored = {model.tensors.info(name).dtype for name in model.tensors.names()}
    return torch.bfloat16 if "BF16" in stored else torch.float16


def _matrices(step: Step, pieces: list[QuantizedTensor]) -> list[QuantizedTensor]:
    """One per expert, else one, of pieces that are rows of them."""
    n = step.tensor.shape[0] if len(step.tensor.shape) == 3 else 1
    rows = sum(piece.shape[0] for piece in pieces) // n
    found: list[QuantizedTensor] = []
    held: list[QuantizedTensor] = []
    for piece in pieces:
        held.append(piece)
        if sum(each.shape[0] for each in held) == rows:
            found.append(joined(held))
            held = []
    return found


def rows_of(matrix: QuantizedTensor, rows: Tensor, factor: Tensor) -> QuantizedTensor:
    """Some rows of a matrix, multiplied."""
    shared = any(value.shape[0] != matrix.shape[0] for value in matrix.params.values())  # one for the whole matrix
    params = {name: value if shared else value[rows] for name, value in matrix.params.items()}
    if not (factor == 1).all():
        if shared:
            raise RecipeError(
                "one scale for a whole matrix cannot follow rows that are scaled apart; take int8 or groups"
            )
        for name in (name for name, value in params.items() if value.is_floating_point()):
            params[name] = (params[name].float() * factor[:, None]).to(params[name].dtype)
    return QuantizedTensor(matrix.grid, (rows.numel(), matrix.shape[1]), matrix.codes[rows], params)
