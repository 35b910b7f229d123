"""What an allocation may choose from, and what each choice takes: one class per kind of output.

The solver sees bytes and damage; which grids a runtime runs, which of its layers must agree and how large the output is
are known here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from whit.checkpoints.gguf import Announced
from whit.grids.floats import Float
from whit.grids.named import GRIDS, grid_named
from whit.layouts.ggml import GGMLType, ggml_type_of
from whit.models.architecture import GGUFTensor, GGUFView
from whit.models.model import Model
from whit.pipeline.folder import FolderJob
from whit.pipeline.formats import FOLDERS
from whit.pipeline.quantize import model_view, predicted_bytes
from whit.recipes import folders
from whit.recipes.recipe import Recipe, Rule

GGUF = "gguf"
# llama.cpp runs all of these. Where rows divide into superblocks, their grids lose less at equal bytes than blocks.
SUPERBLOCKS = (
    *("iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k"),
    *("iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0", "f16"),
)
BLOCKS = ("mxfp4", "iq4_nl", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16")
# Symmetric integers, which every version of vLLM runs at 4 and 8 bits; fewer bits run in some.
INTEGERS = {
    folders.COMPRESSED: tuple(f"int{bits}-g{size}" for bits in range(2, 9) for size in (128, 64, 32)),
    folders.GPTQ: tuple(f"int{bits}-g{size}" for bits in (2, 3, 4, 8) for size in (128, 64, 32)),
    folders.WHIT: (
        *(*SUPERBLOCKS[:-1], *BLOCKS[:-1], "nf4-g64", "nf4-g32", "nvfp4"),
        *(f"int{bits}-g{size}" for bits in (2, 3, 6) for size in (64, 32)),
        *(f"kmeans{bits}" for bits in (2, 3, 4)),
    ),
}
LAYOUTS = (GGUF, *INTEGERS)
FUSED = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))  # one matrix each in vLLM
OUTER = ("token_embd.weight", "output.weight")
SUMMARY = "a grid of its own for every matrix"


class Target(Protocol):
    """One kind of output for one model.

    candidates  tensor -> names of grids, in any order
    groups      tensors that must be on the same grid
    n_weights   in the output
    """

    candidates: dict[str, tuple[str, ...]]
    groups: list[tuple[str, ...]]
    n_weights: int

    def stored(self, name: str, grid: str) -> int:
        """Bytes of a tensor on a grid, without what the header says of it."""
        ...

    def size(self, chosen: Mapping[str, str]) -> int:
        """The exact bytes of the output."""
        ...

    def recipe(self, chosen: Mapping[str, str]) -> Recipe:
        """What a writer takes."""
        ...

    def weights_in(self, name: str) -> int:
        """Weights of a tensor."""
        ...

    def why_not_less(self) -> str:
        """Why there is no smaller output, as a sentence; empty when there is nothing to say."""
        ...


class GGUFTarget:
    """A GGUF file. Its header does not depend on the choices, so that bytes add up exactly."""

    def __init__(self, model: Model, rounding: str, grids: Sequence[str] | None = None) -> None:
        """grids  to choose from, instead of the usual ones"""
        view = model_view(model)
        self._model, self._rounding = model, rounding
        self._tensors = {tensor.name: tensor for tensor in view.tensors if not tensor.keep_float}
        self.candidates, self.groups = candidates(view, grids), list[tuple[str, ...]]()
        self.n_weights = sum(tensor.n_weights for tensor in view.tensors)
        some = {name: grids[0] for name, grids in self.candidates.items()}
        self._others = predicted_bytes(model, self.recipe(some)) - sum(self.stored(*each) for each in some.items())

    def stored(self, name: str, grid: str) -> int:
        """Padding to 32 bytes included."""
        return Announced(name, self._tensors[name].shape, _type(grid).name).n_stored

    def size(self, chosen: Mapping[str, str]) -> int:
        """Header, metadata, tokenizer and padding included."""
        return self._others + sum(self.stored(name, grid) for name, grid in chosen.items())

    def recipe(self, chosen: Mapping[str, str]) -> Recipe:
        """A rule per matrix."""
        rules = [Rule(name, grid, self._rounding) for name, grid in chosen.items()]
        return Recipe("fit", (*rules, Rule("*", "f32")), summary=SUMMARY)

    def weights_in(self, name: str) -> int:
        """Weights of a matrix."""
        return self._tensors[name].n_weights

    def why_not_less(self) -> str:
        """Rows that superblocks do not divide."""
        narrow = [name for name, grids in self.candidates.items() if "iq2_xxs" not in grids]
        if not narrow:
            return ""
        t = self._tensors[narrow[0]]
        return (
            f" {len(narrow)} of {len(self.candidates)} matrices, such as {t.name}, have rows of {t.shape[-1]} "
            "weights, which do not divide into the superblocks of 256 that grids below 4 bits need."
        )


class FolderTarget:
    """A folder for GPUs: weight files are counted, embeddings and head stay in float."""

    def __init__(self, model: Model, layout: str, rounding: str, grids: Sequence[str] | None = None) -> None:
        """grids  to choose from, instead of those that every version of the runtimes runs"""
        view = model_view(model)
        self._model, self._layout, self._rounding, self._asked = model, layout, rounding, grids
        self._form = FOLDERS[layout]
        self._tensors = {t.name: t for t in view.tensors if not t.keep_float}
        self.n_weights = sum(tensor.n_weights for tensor in view.tensors)
        self.candidates = {name: self._grids(t) for name, t in self._tensors.items() if name not in OUTER}
        self.groups = fused(list(self.candidates)) if layout != folders.WHIT else []

    def stored(self, name: str, grid: str) -> int:
        """Codes, scales and what else the layout has."""
        tensor, values = self._tensors[name], grid_named(grid)
        if isinstance(values, Float):
            return 2 * tensor.n_weights
        schema = self._form.layout(values, False).schema(values, _matrix(tensor))
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in schema.values())

    def size(self, chosen: Mapping[str, str]) -> int:
        """Headers and index included."""
        return FolderJob(self._model, self.recipe(chosen)).n_bytes

    def recipe(self, chosen: Mapping[str, str]) -> Recipe:
        """A rule per matrix."""
        rules = [Rule(name, grid, self._rounding) for name, grid in chosen.items()]
        return Recipe("fit", (*rules, Rule("*", "f16")), summary=SUMMARY, layout=self._layout)

    def weights_in(self, name: str) -> int:
        """Weights of a matrix."""
        return self._tensors[name].n_weights

    def why_not_less(self) -> str:
        """Embeddings."""
        return " Embeddings, head and norms stay in 16-bit floats, because the runtimes of this format want it so."

    def _grids(self, tensor: GGUFTensor) -> tuple[str, ...]:
        found = []
        for name in dict.fromkeys(self._asked or INTEGERS[self._layout]):
            grid = grid_named(name)
            if self._form.layout(grid, False).refuses(grid, _matrix(tensor)) is None:
                found.append(name)
        return (*found, "f16") if "f16" not in found else tuple(found)


def target_of(model: Model, layout: str, rounding: str, grids: Sequence[str] | None = None) -> Target:
    """The target for a layout, with grids that somebody asked for or the usual ones."""
    return GGUFTarget(model, rounding, grids) if layout == GGUF else FolderTarget(model, layout, rounding, grids)


def candidates(view: GGUFView, grids: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
    """For every matrix of a GGUF file the grids that it may be stored on, by the length of its rows.

    grids  those that somebody asked for; a matrix that none of them fits has the usual ones
    """
    return {tensor.name: _blocks(tensor, grids or ()) for tensor in view.tensors if not tensor.keep_float}


def _blocks(tensor: GGUFTensor, asked: Sequence[str]) -> tuple[str, ...]:
    known = dict.fromkeys((*SUPERBLOCKS, *BLOCKS, *asked))
    if found := tuple(name for name in known if name in asked and not tensor.shape[-1] % _type(name).block):
        return found
    for names in (SUPERBLOCKS, BLOCKS):
        if not tensor.shape[-1] % _type(names[0]).block:
            return names
    return ("f16",)


def fused(names: list[str]) -> list[tuple[str, ...]]:
    """Which of these GGUF tensors must be on the same grid, block by block, because vLLM multiplies them as one."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(blk\.\d+\.)(\w+)\.weight", name)
        for which, family in enumerate(FUSED):
            if match and match[2] in family:
                found.setdefault((match[1], which), []).append(name)
    return [tuple(each) for each in found.values() if len(each) > 1]


def _matrix(tensor: GGUFTensor) -> tuple[int, int]:
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


def _type(grid: str) -> GGMLType:
    kind = ggml_type_of(GRIDS[grid])
    assert kind is not None  # all of the names above have one
    return kind
