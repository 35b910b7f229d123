"""From one file format to another without rounding again, where the grids agree.

Every matrix is taken as codes and parameters, put into the order of rows that GGUF has, moved onto a grid that the
target holds (grids/recast.py: exactly or not at all) and packed. What no grid of the target holds exactly is measured,
by the error of its weights, and rounded again only on demand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from whit.errors import RecipeError
from whit.grids.floats import Float
from whit.grids.grid import Grid
from whit.grids.indexed import Indexed
from whit.grids.levels import Integers
from whit.grids.named import grid_name, grid_named
from whit.grids.quantized import QuantizedTensor
from whit.grids.recast import first_exact, recast
from whit.grids.scaled import Offset, PerChannel, PerGroup, Scaled, integer_grid
from whit.layouts.ggml import ggml_type_of
from whit.models.architecture import GGUFTensor
from whit.models.links import Links
from whit.models.model import Model
from whit.pipeline.folder import FolderJob
from whit.pipeline.formats import FOLDERS
from whit.pipeline.plain import plain_pieces
from whit.pipeline.plan import Piece, Plan, Rounded, Step
from whit.pipeline.quantize import Progress, Result, model_view, write_gguf
from whit.pipeline.stored import Stored, stored_of
from whit.recipes import folders
from whit.recipes.recipe import Recipe, Rule
from whit.rounding.nearest import nearest

GGUF = "gguf"
FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
TARGETS = (GGUF, folders.GPTQ, folders.AWQ, folders.COMPRESSED, folders.WHIT, *FLOATS)
BLOCKS = ("mxfp4", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # of llama.cpp, smallest first
SIZES = (128, 64, 32)
ROOM, EXACT_ROOM = 0.6, 1.5  # bits per weight by which a matrix may grow, rounded again or without loss
STORED = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class Loss:
    """A matrix that the target cannot hold as it is.

    source, target  names of grids
    error           root of the squared error over the root of the squared weights
    """

    name: str
    source: str
    target: str
    error: float


@dataclass(frozen=True)
class Converted:
    """What came of it.

    exact    matrices whose every value is the same
    rounded  those that were rounded again
    floats   matrices that were codes and are floats now, with their relative error
    """

    result: Result
    exact: int
    rounded: tuple[Loss, ...]
    floats: tuple[Loss, ...]


def convert(
    model: Model, target: str, path: Path, requantize: bool, overwrite: bool = False, progress: Progress | None = None
) -> Converted:
    """Write `model` in the format `target`, one of TARGETS, to `path`.

    requantize  round again what the target cannot hold exactly
    Raises RecipeError for an unknown target, and when something would have to be rounded again without `requantize`;
    OutputError and ModelError as the writers do.
    """
    if target not in TARGETS:
        raise RecipeError(f"There is no format called {target!r}. Known: {', '.join(TARGETS)}.")
    return _Conversion(model, target, requantize, progress).write(path, overwrite)


def same_recipe(model: Model, stored: Stored) -> Recipe:
    """The recipe that a quantized folder follows already: its own format and grids."""
    rules = []
    for name in stored.names():
        matrices = stored.matrices(name)
        grid = "f16" if matrices is None else _exactly(matrices[0].grid, grid_name(matrices[0].grid))
        rules.append(Rule(name, grid))
    method = str(model.quantization.get("quant_method"))
    layout = folders.GPTQ if method == "auto-round" else method
    if layout not in FOLDERS:
        raise RecipeError(
            f"Folders of {method} are read, not written. Make a GGUF file of it first: whit convert --format gguf."
        )
    return Recipe("same", tuple(rules), summary="as it was", layout=layout)


class _Conversion:
    def __init__(self, model: Model, target: str, requantize: bool, progress: Progress | None) -> None:
        self._model, self._target, self._requantize = model, target, requantize
        self._tell = progress or (lambda done, total, what: None)
        self._view = model_view(model)
        self._stored = stored_of(model)
        self._links = Links(self._view)
        self._homes: dict[str, list[str]] = {}
        for name in self._links.disk_names():
            for gguf in self._links.sources(name):
                self._homes.setdefault(gguf, []).append(name)
        self._losses: list[Loss] = []
        self._floats: list[Loss] = []
        self._exact = 0

    def write(self, path: Path, overwrite: bool) -> Converted:
        rules = []
        n = len(self._view.tensors)
        for done, tensor in enumerate(self._view.tensors):
            self._tell(done, 2 * n, f"looking at {tensor.name}")
            rules.append(Rule(tensor.name, self._grid(tensor)))
        if self._losses and not self._requantize:
            worst = sorted(self._losses, key=lambda each: -each.error)[:3]
            named = ", ".join(f"{each.name} ({each.source} to {each.target}: {each.error:.2%})" for each in worst)
            raise RecipeError(
                f"{self._target} cannot hold {len(self._losses)} of {len(self._losses) + self._exact} matrices as they "
                f"are. Rounded again they would be off by, relative to the size of the weights: {named}. "
                "Add --requantize to accept this, or quantize the original again."
            )
        recipe = Recipe(f"convert-{self._target}", tuple(rules), summary=f"converted to {self._target}")
        if self._target == GGUF:
            result = write_gguf(self._model, recipe, path, overwrite, tensors=lambda plan: self._tensors(plan))
        else:
            layout = folders.FLOAT if self._target in FLOATS else self._target
            job = FolderJob(self._model, replace(recipe, layout=layout), FLOATS.get(self._target))
            result = job.write(path, overwrite, tensors=self._tensors(job.plan))
        return Converted(result, self._exact, tuple(self._losses), tuple(self._floats))

    def _grid(self, tensor: GGUFTensor) -> str:
        """The name of the grid that a tensor will be on."""
        matrices = None if tensor.keep_float else self._stored.matrices(tensor.name)
        if matrices is None:
            return self._float(tensor)
        source, target = matrices[0].grid, self._chosen(tensor, matrices)
        if isinstance(target, Float):
            error = max(_error(each, _onto(each, target)) for each in matrices)
            self._floats.append(Loss(tensor.name, grid_name(source), grid_name(target), error))
        elif all(recast(each, target) is not None for each in matrices):
            self._exact += 1
        else:
            error = max(_error(each, _onto(each, target)) for each in matrices)
            self._losses.append(Loss(tensor.name, grid_name(source), grid_name(target), error))
        name = grid_name(target)
        return name if ":" in name or isinstance(target, Float) or self._target == GGUF else _exactly(target, name)

    def _float(self, tensor: GGUFTensor) -> str:
        if self._target in FLOATS:
            return self._target
        if self._target != GGUF:
            return "f16"  # the folder's own float, whatever it is
        if tensor.keep_float:
            return "f32"
        gguf = self._model.gguf_tensors
        homes = self._homes.get(tensor.name, ())
        kinds = {gguf.info(tensor.name).dtype} if gguf else {self._model.tensors.info(name).dtype for name in homes}
        return STORED.get(kinds.pop(), "f32") if len(kinds) == 1 else "f32"

    def _chosen(self, tensor: GGUFTensor, matrices: Sequence[QuantizedTensor]) -> Grid:
        if self._target in FLOATS:
            return Float(FLOATS[self._target])
        if self._target != GGUF and tensor.name in ("token_embd.weight", "output.weight"):
            return Float(torch.float16)  # these runtimes want it so
        shape = matrices[0].shape
        held = [grid for grid in self._candidates(matrices[0].grid) if self._holds(grid, shape)]
        if not held:
            return Float(torch.float16)
        own, least = (grid.bits_per_weight(shape[1]) for grid in (matrices[0].grid, held[0]))
        small = [grid for grid in held if grid.bits_per_weight(shape[1]) <= max(own + EXACT_ROOM, least)]
        for grid in small:
            if all(recast(each, grid) is not None for each in matrices):
                return grid
        small = [grid for grid in small if grid.bits_per_weight(shape[1]) <= own + ROOM] or small
        return min(small, key=lambda grid: _error(matrices[0], _onto(matrices[0], grid)))

    def _candidates(self, source: Grid) -> list[Grid]:
        """Grids of the target, the source's own first, then from few bits to many."""
        if self._target == GGUF:
            return [source, *(grid_named(name) for name in BLOCKS)]  # the first that holds the rows is the smallest
        found: list[Grid] = [source]
        base = source.base if isinstance(source, Indexed) else source
        own = base.levels.bits if isinstance(base, Scaled) and isinstance(base.levels, Integers) else 4
        for bits in range(own, 9):
            for size in SIZES:
                for symmetric in (True, False):
                    grid = integer_grid(bits, PerGroup(size), symmetric)
                    found += [grid, Indexed(grid)] if isinstance(source, Indexed) else [grid]
            found += [integer_grid(bits, PerChannel(), symmetric) for symmetric in (True, False)]
        if isinstance(source, Scaled) and source.scale_dtype != torch.float16 and self._target == folders.COMPRESSED:
            scaled = [grid for grid in found[1:] if isinstance(grid, Scaled)]
            found += [replace(grid, scale_dtype=source.scale_dtype) for grid in scaled]
        return found

    def _holds(self, grid: Grid, shape: tuple[int, int]) -> bool:
        if isinstance(grid, Float):
            return False
        if self._target == GGUF:
            kind = ggml_type_of(grid)
            return kind is not None and shape[1] % kind.block == 0
        if isinstance(grid, Scaled) and grid.offset is Offset.MINIMUM and self._target != folders.WHIT:
            return False
        try:
            return FOLDERS[self._target].layout(grid, False).refuses(grid, shape) is None
        except (ValueError, AssertionError):
            return False

    def _tensors(self, plan: Plan) -> Iterator[Rounded]:
        n = len(plan.steps)
        for done, step in enumerate(plan.steps):
            self._tell(n + done, 2 * n, step.tensor.name)
            yield step, self._pieces(step)
        self._tell(2 * n, 2 * n, "done")

    def _pieces(self, step: Step) -> Iterator[Piece]:
        if step.stored is not None:
            yield from plain_pieces(step)
            return
        matrices = None if isinstance(step.grid, Float) else self._stored.matrices(step.tensor.name)
        if matrices is None:
            yield from plain_pieces(replace(step, rounding="nearest"))
            return
        for matrix in matrices:
            yield _onto(matrix, step.grid)


def _onto(matrix: QuantizedTensor, grid: Grid) -> QuantizedTensor:
    """Exactly where that is possible, else rounded again."""
    return first_exact(matrix, [grid]) or nearest(matrix.dequantize(), grid)


def _error(matrix: QuantizedTensor, other: QuantizedTensor) -> float:
    W = matrix.dequantize()
    return ((other.dequantize() - W).norm() / W.norm().clamp(min=1e-30)).item()


def _exactly(grid: Grid, name: str) -> str:
    """A name that says the dtype of scales, so that it is not chosen anew."""
    return f"{name}:f16" if isinstance(grid, Scaled) and grid.scale_dtype == torch.float16 else name
