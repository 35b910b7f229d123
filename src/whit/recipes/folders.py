"""Recipes for the runtimes of GPUs, by the names that people use: gptq-4bit-g128, awq-4bit-g128, w4a16, w8a8, fp8, ...

    gptq-<2|3|4|8>bit[-g<n>][-asym]    GPTQ; per channel without a group size
    awq-4bit[-g<n>]                    AWQ, with zero points
    w<2..8>a16[-g<n>][-asym]           compressed-tensors, weights alone; groups of 128 when nothing is said
    w8a8                               compressed-tensors, int8 per channel, activations int8 per token
    fp8                                compressed-tensors, FP8 per channel, activations FP8 per token
    w8a8-static, fp8-static            the same with one fixed scale per layer for activations, from calibration
    mxfp4, nvfp4                       compressed-tensors, FP4 in groups of 32 with powers of two, of 16 with FP8 scales
    nf4, fp4                           Whit's own layout, in groups of 64 with a half-precision scale
    whit-<grid>                        Whit's own layout, any grid
    uniform-4bit, kmeans-4bit, kl-4bit Whit's own layout, quantizers.py

Embeddings and head stay in float: these runtimes want it so.
"""

from __future__ import annotations

import re

from whit.errors import RecipeError
from whit.grids.named import ALIASES, GRIDS, grid_named
from whit.recipes import quantizers
from whit.recipes.recipe import Recipe, Rule

EXAMPLES = (
    "gptq-4bit-g128",
    "awq-4bit-g128",
    "w4a16",
    "w8a16",
    "w8a8",
    "w8a8-static",
    "fp8",
    "fp8-static",
    "w3a16-g128",
    "w2a16-g64",
    "mxfp4",
    "nvfp4",
    "nf4",
    "fp4",
    *quantizers.EXAMPLES,
)
GPTQ, AWQ, COMPRESSED, WHIT = "gptq", "awq", "compressed-tensors", "whit"
FLOAT = "float"  # a folder as transformers writes it
INT8_TOKENS, FP8_TOKENS = "int8 per token", "fp8 per token"
LAYOUTS = (GPTQ, AWQ, COMPRESSED, WHIT, FLOAT)
INT8_FIXED, FP8_FIXED = "int8 per tensor", "fp8 per tensor"
FIXED = (INT8_FIXED, FP8_FIXED)
SMOOTHED = (INT8_TOKENS, INT8_FIXED)  # columns are rescaled for the inputs' sake too
ACTIVATIONS = ("", INT8_TOKENS, FP8_TOKENS, *FIXED)
_GPTQ = re.compile(r"gptq-([2348])bit(-g\d+)?(-asym)?")
_AWQ = re.compile(r"awq-4bit(-g\d+)?")
_WEIGHTS = re.compile(r"w([2-8])a16(-g\d+|-channel)?(-asym)?")
_SINGLE = {
    "w8a8": ("int8", INT8_TOKENS),
    "w8a8-static": ("int8", INT8_FIXED),
    "fp8": ("fp8", FP8_TOKENS),
    "fp8-static": ("fp8", FP8_FIXED),
    "mxfp4": ("mxfp4", ""),
    "nvfp4": ("nvfp4", ""),
}
_OWN = {"nf4": "nf4-g64", "fp4": "fp4-g64"}  # that no public format of folders holds


def folder_recipe(name: str, rounding: str = "nearest") -> Recipe | None:
    """The recipe called `name`, None when it is not one of these. Raises RecipeError for a grid that does not exist."""
    key = name.lower()
    if found := _GPTQ.fullmatch(key):
        return _recipe(key, GPTQ, f"int{found[1]}{found[2] or ''}{found[3] or ''}", rounding)
    if found := _AWQ.fullmatch(key):
        return _recipe(key, AWQ, f"int4{found[1] or ''}-asym", rounding)
    if found := _WEIGHTS.fullmatch(key):
        share = {None: "-g128", "-channel": ""}.get(found[2], found[2])
        return _recipe(key, COMPRESSED, f"int{found[1]}{share}{found[3] or ''}", rounding)
    if key in _SINGLE:
        grid, activations = _SINGLE[key]
        return _recipe(key, COMPRESSED, grid, rounding, activations)
    if key in _OWN:
        return _recipe(key, WHIT, _OWN[key], rounding)
    if quantizer := quantizers.quantizer_named(key):
        return _recipe(key, WHIT, quantizer.grid, quantizer.rounding or rounding)
    if key.startswith("whit-"):
        return _recipe(key, WHIT, key.removeprefix("whit-"), rounding)
    return None


def _recipe(name: str, layout: str, grid: str, rounding: str, activations: str = "") -> Recipe:
    try:
        grid_named(grid)
        known = layout == WHIT or grid.partition(":")[0] in {**GRIDS, **ALIASES}  # other groups no runtime has
    except RecipeError:
        known = False
    if not known:
        raise RecipeError(f"Recipe {name}: groups have 32, 64 or 128 weights; the grid {grid} does not exist.")
    outer = tuple(Rule(pattern, "f16") for pattern in ("token_embd.weight", "output.weight"))
    return Recipe(name, (*outer, Rule("*", grid, rounding)), layout=layout, activations=activations)
