"""What a run will do, decided from headers alone: a type and a size for every tensor, and every exception.

Nothing is substituted silently: a tensor that does not get what the recipe says carries the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from whit.errors import RecipeError
from whit.grids.grid import Grid
from whit.grids.named import GRIDS, grid_named
from whit.grids.quantized import QuantizedTensor
from whit.layouts.ggml import GGMLType, ggml_type_of
from whit.models.architecture import GGUFTensor, GGUFView
from whit.recipes.mixtures import Facts
from whit.recipes.named import resolved
from whit.recipes.recipe import Recipe
from whit.rounding.methods import FISHER, METHODS

FLOAT_GRIDS = ("f32", "f16", "bf16")
# For rows that do not divide into superblocks of 256, llama.cpp's choice; documented in docs/formats.md.
FALLBACKS = {
    **{"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"},
    **dict.fromkeys(("tq1_0", "tq2_0"), "q4_0"),
    **dict.fromkeys(("iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"), "iq4_nl"),
}
FALLBACK = "f16"  # for rows that no block divides
# llama.cpp's numbers for its mixtures; a file of another mixture goes by the type that most of its weights have.
FILE_TYPES = {
    **{"f32": 0, "f16": 1, "bf16": 32, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "iq4_nl": 25},
    **{"q2_k": 10, "q2_k_s": 21, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q3_k": 12, "q4_k_s": 14, "q4_k_m": 15},
    **{"q4_k": 15, "q5_k_s": 16, "q5_k_m": 17, "q5_k": 17, "q6_k": 18, "iq4_xs": 30},
    **{"iq2_xxs": 19, "iq2_xs": 20, "iq2_s": 28, "iq2_m": 29, "iq3_xxs": 23, "iq3_xs": 22, "iq3_s": 26, "iq3_m": 27},
    **{"tq1_0": 36, "tq2_0": 37, "mxfp4_moe": 38, "mxfp4": 38},
}


@dataclass(frozen=True)
class Step:
    """One tensor of the output.

    tensor     what will be read
    type       what it is written as: a GGML type, or in a folder the name of a grid
    grid       its values
    n_bytes    what it takes in the output
    rounding   name of the rounding
    exception  why this is not what the recipe says, else empty
    stored     reads the bytes when the source already holds exactly this type, else None: they are copied
    """

    tensor: GGUFTensor
    type: str
    grid: Grid
    n_bytes: int
    rounding: str
    exception: str = ""
    stored: Callable[[], Tensor] | None = None

    @property
    def needs_moments(self) -> bool:
        """Whether the rounding looks at what arrives at the layer."""
        return self.stored is None and self.rounding in METHODS

    @property
    def needs_fisher(self) -> bool:
        """Whether the rounding asks how much each weight matters to the model."""
        return self.stored is None and self.rounding in FISHER


Piece = QuantizedTensor | Tensor  # rows of a matrix; or all bytes of a tensor that the source holds as they shall be
Rounded = tuple[Step, Iterator[Piece]]


@dataclass(frozen=True)
class Plan:
    """All steps in file order, and the metadata of the file."""

    recipe: Recipe
    metadata: dict[str, Any]
    steps: tuple[Step, ...]

    @property
    def n_weights(self) -> int:
        """Weights in all tensors."""
        return sum(step.tensor.n_weights for step in self.steps)

    @property
    def exceptions(self) -> list[Step]:
        """Steps that do not follow the recipe."""
        return [step for step in self.steps if step.exception]


def make_plan(view: GGUFView, recipe: Recipe, stored: Callable[[str, str], Callable[[], Tensor] | None]) -> Plan:
    """Decide every tensor's type.

    stored  (tensor name, type name) -> a reader of its bytes when the source holds that very type, else None
    Raises RecipeError when the recipe has no rule for a tensor.
    """
    shapes = [(tensor.name, tensor.shape) for tensor in view.tensors if not tensor.keep_float]
    recipe = resolved(recipe, shapes, _facts(view, recipe))
    steps = tuple(_step(view, tensor, recipe, stored) for tensor in view.tensors)
    return Plan(recipe, dict(view.metadata), steps)


def _step(
    view: GGUFView, tensor: GGUFTensor, recipe: Recipe, stored: Callable[[str, str], Callable[[], Tensor] | None]
) -> Step:
    rule = recipe.rule_for(_names(view, tensor))
    wanted = ggml_type_of(grid_named(rule.grid))
    if wanted is None:
        known = ", ".join(name for name, grid in GRIDS.items() if ggml_type_of(grid))
        raise RecipeError(f"GGUF has no type for the grid {rule.grid}. It has: {known}.")
    exception = ""
    if tensor.keep_float and rule.grid != "f32":
        wanted, exception = _type("f32"), tensor.reason
    elif tensor.shape[-1] % wanted.block:
        exception = f"rows of {tensor.shape[-1]} weights do not divide into {wanted.name} blocks of {wanted.block}"
        wanted = _type(FALLBACKS.get(wanted.name.lower(), FALLBACK))
        if tensor.shape[-1] % wanted.block:
            wanted = _type(FALLBACK)
    rounding = "nearest" if wanted.name.lower() in FLOAT_GRIDS else rule.rounding
    n_bytes = wanted.n_bytes(tensor.shape)
    return Step(tensor, wanted.name, wanted.grid, n_bytes, rounding, exception, stored(tensor.name, wanted.name))


def _facts(view: GGUFView, recipe: Recipe) -> Facts:
    def number(key: str, otherwise: int) -> int:
        value = view.metadata.get(f"{view.architecture}.{key}", otherwise)
        return int(max(value) if isinstance(value, list) else value)

    heads = number("attention.head_count", 1)
    return Facts(
        n_blocks=number("block_count", 1),
        n_experts=number("expert_count", 0),
        heads_per_kv=heads // max(1, number("attention.head_count_kv", heads)),
        tied=not any(tensor.name == "output.weight" for tensor in view.tensors),
        importance=recipe.rounding in METHODS,
    )


def _names(view: GGUFView, tensor: GGUFTensor) -> list[str]:
    tied = not any(other.name == "output.weight" for other in view.tensors)
    return [tensor.name, "output.weight"] if tied and tensor.name == "token_embd.weight" else [tensor.name]


def _type(name: str) -> GGMLType:
    kind = ggml_type_of(GRIDS[name])
    assert kind is not None  # every float grid has a type
    return kind
