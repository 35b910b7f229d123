"""Every tensor of a written file beside the original's: errors in units of what the type gives, and faults.

Two decoders read the file, and their values are compared as well. One block is in memory at a time, of the file and of
the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whit.checkpoints.quantized import QuantizedTensors
from whit.checkpoints.second import SecondFolder, SecondGGUF
from whit.errors import ModelError, RecipeError
from whit.evaluation.diagnosis import CHUNK, Damage, matrix_damage, vector_damage
from whit.grids.grid import Grid
from whit.grids.named import DTYPES, GRIDS, grid_name
from whit.layouts.ggml import GGML_TYPES
from whit.models.architecture import GGUFTensor, GGUFView, from_gguf, passthrough_view
from whit.models.model import Model
from whit.pipeline.frame import Frame, by_block
from whit.pipeline.quantize import Progress, model_view
from whit.pipeline.stored import Stored, stored_of
from whit.rounding.nearest import nearest

Read = Callable[[], Tensor]
AGREE = 1e-4  # relative difference between two decoders: their last bits may differ
WIDEST = 64  # columns that are looked at together where more share a scale
UNKNOWN = 0.7  # what stands for plain rounding on a type without a grid here: an error of 30 % is taken for usual


@dataclass(frozen=True)
class Decoded:
    """A written file, decoded the second way.

    model   to be evaluated: as the file was opened, but for the values
    view    the same under GGUF names
    alone   layers that only the first decoder knows, complete when all have been read
    """

    model: Model
    view: GGUFView
    alone: list[str]


@dataclass(frozen=True)
class Scan:
    """What was found.

    damages   of every tensor, in file order
    types     the name of each tensor's grid
    bits      per weight of each tensor, scales included; not a number where parts are on different grids
    disagree  tensors that the two decoders read differently, by how much of their size
    frame     brings the file's tensors beside the original's
    """

    damages: Mapping[str, Damage]
    types: Mapping[str, str]
    bits: Mapping[str, float]
    disagree: Mapping[str, float]
    frame: Frame


def decoded(model: Model) -> Decoded:
    """The written model read by the second decoder. Raises BrokenFileError as that does."""
    if model.gguf_tensors is not None:
        second = SecondGGUF(model.gguf_tensors)
        _, tensors = from_gguf(model.gguf_metadata, second)
        return Decoded(replace(model, tensors=tensors), passthrough_view(model.gguf_metadata, second), [])
    if not isinstance(model.tensors, QuantizedTensors):
        return Decoded(model, model_view(model), [])
    decoder = SecondFolder(model.quantization)
    other = replace(model, tensors=model.tensors.with_decoder(decoder.decode))
    return Decoded(other, model_view(other), decoder.alone)


def scan(written: Model, second: Decoded, original: Model, progress: Progress | None = None) -> Scan:
    """Compare every tensor.

    written   the file as it was opened, for the first decoder
    Raises ModelError when the file is of another architecture or of other shapes.
    """
    tell = progress or (lambda done, total, what: None)
    mine, view = {tensor.name: tensor for tensor in second.view.tensors}, model_view(original)
    theirs = {tensor.name: tensor for tensor in view.tensors}
    check_shapes(written, original, second.view, view)
    names = [name for name in mine if name in theirs]  # a head that equals the embedding may be in one of them
    stored, frame = stored_of(written), Frame(view)
    damages: dict[str, Damage] = {}
    types: dict[str, str] = {}
    bits: dict[str, float] = {}
    disagree: dict[str, float] = {}
    done, total = 0, sum(theirs[name].n_weights for name in names)
    for prefix, block in by_block(names).items():
        Q, W = ({name: tensors[name].read() for name in block} for tensors in (mine, theirs))
        frame.find(block, prefix, {name: each.nan_to_num() for name, each in Q.items()}, W)
        for name in block:
            tell(done, total, f"looking at {name}")
            first, grid, types[name] = _first(written, stored, name)
            bits[name] = _bits(written, grid, name, theirs[name])
            difference = (first.view(Q[name].shape) - Q[name]).norm() / first.norm().clamp_min(1e-30)
            if not difference <= AGREE:  # not a number is no agreement
                disagree[name] = difference.item()
            columns = frame.columns.get(name)
            damages[name] = _damage(frame.undo(name, Q[name]), W[name], grid, _others(name, theirs), columns)
            done += theirs[name].n_weights
    tell(total, total, "looked at all tensors")
    return Scan({name: damages[name] for name in names}, types, bits, disagree, frame)


def check_shapes(written: Model, original: Model, mine: GGUFView, theirs: GGUFView) -> None:
    """Raise ModelError when a file, seen as `mine`, is no quantized form of the original, seen as `theirs`."""
    shapes = {tensor.name: tensor.shape for tensor in theirs.tensors}
    if mine.architecture != theirs.architecture:
        raise ModelError(
            f"{written.label} is a {mine.architecture} model, {original.label} a {theirs.architecture} one."
        )
    for tensor in mine.tensors:
        expected = shapes.get(tensor.name, tensor.shape)
        if tensor.shape != expected:
            raise ModelError(
                f"{tensor.name} is {list(tensor.shape)} in {written.label} and {list(expected)} in {original.label}: "
                "they are different models. Give the model that the file was made from."
            )


def _first(written: Model, stored: Stored, name: str) -> tuple[Tensor, Grid | None, str]:
    """What the first decoder reads, float32; the grid, None where there is none here; its name."""
    file = written.gguf_tensors
    if file is not None and file.info(name).dtype not in GGML_TYPES:
        return stored.read(name), None, file.info(name).dtype
    try:
        matrices = stored.matrices(name)
    except RecipeError:  # parts of one matrix, on different grids
        return stored.read(name), None, "several"
    if matrices is None:
        W = stored.read(name)
        kind = next((kind for kind in ("f16", "bf16") if torch.equal(W.to(DTYPES[kind]).float(), W)), "f32")
        return W, GRIDS[kind], kind
    return torch.cat([each.dequantize() for each in matrices]), matrices[0].grid, grid_name(matrices[0].grid)


def _bits(written: Model, grid: Grid | None, name: str, tensor: GGUFTensor) -> float:
    if grid is not None:
        return grid.bits_per_weight(tensor.shape[-1])
    file = written.gguf_tensors
    return math.nan if file is None else 8 * file.info(name).n_bytes / tensor.n_weights


def _damage(
    Q: Tensor, W: Tensor, grid: Grid | None, others: Mapping[str, Read], columns: Tensor | None = None
) -> Damage:
    """columns  [cols] what they are multiplied with in the file: plain rounding loses other weights there"""
    if W.dim() < 2:
        return vector_damage(Q, W, others)

    def rounded(rows: Tensor) -> Tensor:
        if grid is None:
            return rows * UNKNOWN
        return nearest(rows, grid).dequantize() if columns is None else _within(rows, grid, columns)

    span = grid.spans(W.shape[-1])[-1] if grid else CHUNK
    width = max(CHUNK, min(span, WIDEST))
    return matrix_damage(Q.reshape(-1, Q.shape[-1]), W.reshape(-1, W.shape[-1]), rounded, others, width)


def _within(rows: Tensor, grid: Grid, columns: Tensor) -> Tensor:
    """Plain rounding of rescaled columns, scaled back."""
    return nearest(rows * columns, grid).dequantize() / columns


def _others(name: str, tensors: Mapping[str, GGUFTensor]) -> dict[str, Read]:
    """Tensors of the same shape that this one may be confused with: of its block, then of its kind elsewhere."""
    block, kind = _split(name)
    alike = [each for each in tensors if each != name and tensors[each].shape == tensors[name].shape]
    vector = len(tensors[name].shape) == 1  # there are few, and they are read at once
    related = [each for each in alike if vector or _split(each)[0] == block or _split(each)[1] == kind]
    return {each: _reader(tensors[each]) for each in sorted(related, key=lambda each: _split(each)[0] != block)}


def _reader(tensor: GGUFTensor) -> Read:
    return lambda: tensor.read().reshape(-1, tensor.shape[-1]) if len(tensor.shape) > 1 else tensor.read()


def _split(name: str) -> tuple[str, str]:
    """Block and kind; outside the blocks the kind is the name."""
    if not name.startswith("blk."):
        return "", name
    _, block, kind = name.split(".", 2)
    return block, kind
