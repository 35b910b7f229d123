"""What every matrix becomes in a folder for GPUs, decided from headers alone, with a reason for each exception.

A group size that does not divide the rows is made smaller, and where a format has one size for all, for all; what no
group divides, or the words of a layout do not fit, stays in float.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from whit.errors import RecipeError
from whit.grids.codebook import Codebook
from whit.grids.floats import Float
from whit.grids.grid import Grid
from whit.grids.named import grid_named, integer_name
from whit.grids.scaled import PerGroup, Scaled
from whit.models.architecture import GGUFTensor, GGUFView
from whit.pipeline.formats import Format
from whit.pipeline.plan import Plan, Step
from whit.recipes.recipe import Recipe, Rule

SMALLER = (64, 32)  # groups tried where rows do not divide
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class FolderPlanner:
    """Decides for one model and one kind of folder."""

    def __init__(
        self,
        view: GGUFView,
        form: Format,
        recipe: Recipe,
        dtype: torch.dtype,
        lies: Callable[[str], bool],
        stacked: Callable[[str], bool],
    ):
        """For one model.

        dtype    of floats and, where the layout allows it, of scales
        lies     whether a matrix is a Conv1D's
        stacked  whether the folder has the matrices of all experts in one tensor
        """
        self._view, self._form, self._recipe, self._dtype = view, form, recipe, dtype
        self._lies, self._stacked = lies, stacked

    def plan(self) -> Plan:
        """All tensors.

        Raises RecipeError when nothing can be quantized as the recipe says, and for experts in one tensor.
        """
        tied = not any(tensor.name == "output.weight" for tensor in self._view.tensors)
        rules = {}
        for tensor in self._view.tensors:
            names = [tensor.name, "output.weight"] if tied and tensor.name == "token_embd.weight" else [tensor.name]
            rules[tensor.name] = self._recipe.rule_for(names)
        sizes = self._sizes(rules)
        steps = [self._step(tensor, rules[tensor.name], sizes) for tensor in self._view.tensors]
        wanted = [tensor.name for tensor in self._view.tensors if not tensor.keep_float]
        if all(isinstance(step.grid, Float) for step in steps) and any(
            not isinstance(grid_named(rules[name].grid), Float) for name in wanted
        ):
            reasons = {step.exception for step in steps if step.exception and not step.tensor.keep_float}
            raise RecipeError(f"Recipe {self._recipe.name} quantizes nothing here: {'; '.join(sorted(reasons))}.")
        return Plan(self._recipe, dict(self._view.metadata), tuple(steps))

    def _sizes(self, rules: dict[str, Rule]) -> dict[Grid, int]:
        """For a format with one group size for all: the largest size that divides every matrix of a grid."""
        found: dict[Grid, int] = {}
        for tensor in self._view.tensors if self._form.one_size else ():
            grid = grid_named(rules[tensor.name].grid)
            fitted, _ = self._fitted(tensor, grid, ":" in rules[tensor.name].grid)
            if isinstance(fitted, Scaled) and isinstance(fitted.scheme, PerGroup) and not tensor.keep_float:
                found[grid] = min(found.get(grid, fitted.scheme.size), fitted.scheme.size)
        return found

    def _step(self, tensor: GGUFTensor, rule: Rule, sizes: dict[Grid, int]) -> Step:
        grid = grid_named(rule.grid)
        if isinstance(grid, Float):
            return self._float(tensor, "")
        if tensor.keep_float:
            return self._float(tensor, tensor.reason)
        if self._stacked(tensor.name):
            raise RecipeError(
                f"{tensor.name}: this architecture has all experts of a block in one tensor, for which folders of "
                f"{self._recipe.layout} have no place. Write a GGUF file, where --recipe mxfp4_moe takes experts that "
                "are MXFP4 already as they are; or keep the experts in float: --keep '*_exps.weight=f16' (whit "
                "quantize), --format bf16 (whit convert)."
            )
        if self._form.linear and self._lies(tensor.name):
            return self._float(tensor, "this format quantizes nn.Linear alone, not Conv1D")
        fitted, reason = self._fitted(tensor, grid, ":" in rule.grid)
        if fitted is None:
            return self._float(tensor, reason)
        if grid in sizes and isinstance(fitted, Scaled) and fitted.scheme != PerGroup(sizes[grid]):
            fitted = replace(fitted, scheme=PerGroup(sizes[grid]))
            reason = f"groups of {sizes[grid]}, because this format has one size for all"
        shape = matrix_shape(tensor)
        schema = self._form.layout(fitted, bool(self._recipe.activations)).schema(fitted, shape)
        n_bytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in schema.values())
        return Step(tensor, integer_name(fitted), fitted, n_bytes, rule.rounding, reason)

    def _fitted(self, tensor: GGUFTensor, grid: Grid, as_is: bool) -> tuple[Grid | None, str]:
        """The grid for this matrix, None for float; and why it is not the one of the recipe."""
        if isinstance(grid, Float) or tensor.keep_float:
            return None, ""
        rows, cols = matrix_shape(tensor)
        candidates = [self._scaled(grid, as_is)]
        if isinstance(grid, Scaled | Codebook) and isinstance(grid.scheme, PerGroup):
            sizes = [size for size in SMALLER if size < grid.scheme.size]
            candidates += [self._scaled(replace(grid, scheme=PerGroup(size)), as_is) for size in sizes]
        first = None
        for candidate in candidates:
            layout = self._form.layout(candidate, bool(self._recipe.activations))
            refused = layout.refuses(candidate, (rows, cols))
            first = first or refused
            if refused is None:
                return candidate, first or ""
        return None, first or ""

    def _scaled(self, grid: Grid, as_is: bool) -> Grid:
        """With scales of the model's dtype, where the layout leaves the choice and the recipe said nothing."""
        if as_is or not isinstance(grid, Scaled) or grid.scale_dtype != torch.float16 or self._dtype == torch.float16:
            return grid
        other = replace(grid, scale_dtype=self._dtype)
        layout = self._form.layout(other, bool(self._recipe.activations))
        return other if layout.refuses(other, (32, grid.spans(128)[0])) is None else grid

    def _float(self, tensor: GGUFTensor, reason: str) -> Step:
        return Step(
            tensor, FLOATS[self._dtype], Float(self._dtype), self._dtype.itemsize * tensor.n_weights, "nearest", reason
        )


def matrix_shape(tensor: GGUFTensor) -> tuple[int, int]:
    """(rows, cols) of one matrix; of a stack of experts, all rows."""
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]
