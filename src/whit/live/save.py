"""Quantized live models on disk, and back: `save` and `load`, safetensors and a JSON map, no original needed.

    FOLDER/model.safetensors   every tensor of the frozen model
    FOLDER/whit.json           which module is a twin, on which grid, and how its inputs are quantized
    FOLDER/config.json         transformers' configuration, when the model has one

`load` also opens whatever else Whit reads (live/checkpoint.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from whit.checkpoints.atomic import check_folder, own_files
from whit.checkpoints.folder import INDEX, SINGLE, open_folder, read_config, read_json
from whit.checkpoints.safetensors_writer import NAMES, SHARD_BYTES, Shards
from whit.errors import BrokenFileError, ModelError, OutputError, RecipeError
from whit.grids.grid import Grid, Spec
from whit.grids.named import grid_name, grid_named
from whit.kernels.form import buffer_specs
from whit.kernels.packed import Packed
from whit.live.attention import attend_natively
from whit.live.checkpoint import check_buffers, empty_model, fill_buffers, live_checkpoint
from whit.live.experts import QExperts
from whit.live.inputs import Inputs
from whit.live.modules import QConv1D, QLinear, quantize_outputs
from whit.live.quantize import swap, twin_of
from whit.live.salient import Beside
from whit.live.stored import Frozen, settle
from whit.live.twin import Ties, Twin
from whit.models.model import Model
from whit.models.open import LIVE

MAP, VERSION = LIVE, 1
OWN = (MAP, SINGLE, INDEX, "model-*-of-*.safetensors", "config.json", "generation_config.json")
BROKEN = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecipeError)


def save(model: nn.Module, folder: str | Path, tokenizer: Any = None, overwrite: bool = False) -> None:
    """Write a frozen model to a folder, which appears whole or not at all.

    tokenizer  transformers', to lie beside it
    overwrite  whether an older model may be replaced; what else lies beside it is kept
    Raises OutputError when the model is not frozen, or the folder exists or cannot be written.
    """
    check_folder(Path(folder), 0, overwrite)
    save_among(model, folder, tokenizer)


def save_among(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """As `save`, into a folder of anything: files of an older model are replaced, all others are kept.

    Raises OutputError when the model is not frozen, or the folder cannot be written.
    """
    path = Path(folder)
    loose = [name for name, each in model.named_modules() if isinstance(each, Twin) and each.frozen is None]
    if loose:
        raise OutputError(f"{len(loose)} layers are not frozen yet ({loose[0]} is one): freeze(model) first.")
    tensors, tied = _tensors(model)
    for name, value in tensors.items():
        if value.dtype not in NAMES:
            raise OutputError(f"{name} is {value.dtype}, which no safetensors file holds: store it as another type.")
    content = {"version": VERSION, "modules": map_of(model), "tied": tied}
    shards = Shards({name: Spec(tuple(each.shape), each.dtype) for name, each in tensors.items()}, SHARD_BYTES)
    with own_files(path, shards.n_bytes, OWN) as partial:
        shards.create(partial)
        for name, value in tensors.items():
            shards.write(name, value.detach().cpu())
        shards.close()
        (partial / MAP).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        config = getattr(model, "config", None)
        if hasattr(config, "to_dict"):
            described = {**cast(Any, config).to_dict(), "architectures": [type(model).__name__]}
            (partial / "config.json").write_text(json.dumps(described, indent=2, default=str) + "\n", encoding="utf-8")
        for each in (getattr(model, "generation_config", None), tokenizer):
            if hasattr(each, "save_pretrained"):
                cast(Any, each).save_pretrained(partial)


def load(path: str | Path, model: nn.Module | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """A live model from a folder or file; quantized layers hold the very codes that are stored.

    path   a folder of `save`; or what `open_model` takes: folders of GPTQ, AWQ, compressed-tensors, GGUF files
    model  for folders of models that transformers does not know: the original's architecture, weights do not matter
           and may be on the meta device. It is changed in place
    dtype  of what is not quantized; None for the type that was saved, or float32
    Raises ModelError (BrokenFileError) when files are missing, damaged or do not belong together.
    """
    folder = Path(path).expanduser()
    if not (folder / MAP).is_file():
        if model is not None:
            raise ModelError(f"{folder} has no {MAP}: it was not written by whit.save, and needs no model.")
        return live_checkpoint(path, dtype or torch.float32)
    content, (source, _) = read_json(folder / MAP), open_folder(folder)
    if content.get("version") != VERSION:
        raise ModelError(f"{folder}: {MAP} has version {content.get('version')!r}; this Whit reads version {VERSION}.")
    if model is None:
        model = empty_model(Model(str(path), read_config(folder), source, 0), named=True)
    fill_buffers(model)
    try:
        shape_as(model, content["modules"])
        state = {name: source.read(name) for name in source.names()}
        state |= {name: state[other] for name, other in content["tied"].items()}
        if dtype is not None:
            kept = _stored_names(model)
            state = {k: v.to(dtype) if v.is_floating_point() and k not in kept else v for k, v in state.items()}
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        if missing or unexpected:
            named = ", ".join([*missing, *unexpected][:3])
            raise BrokenFileError(f"{folder}: {len(missing)} tensors missing, {len(unexpected)} unknown ({named}).")
        for each in model.modules():  # kernels trust what they are given
            if isinstance(each, Frozen):
                each.packed.check()
            elif isinstance(each, Beside):
                each.check()
    except BROKEN as error:
        raise BrokenFileError(f"{folder}: {MAP} and the tensors do not describe this model ({error}).") from None
    check_buffers(model)
    _tie(model, content["tied"])
    like = dtype or next((each.dtype for each in model.parameters()), torch.float32)
    for twin in (each for each in model.modules() if isinstance(each, Twin) and not each.told):
        twin.like = twin.like.to(like)  # of the others the file says it
    settle(model)
    attend_natively(model)
    return model.eval()


def _tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """One parameter where one was saved under two names."""
    for name, other in tied.items():
        (parent, _, key), (home, _, own) = name.rpartition("."), other.rpartition(".")
        parameters = model.get_submodule(parent)._parameters
        if key in parameters:
            parameters[key] = model.get_submodule(home)._parameters[own]


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, and what other names it has."""
    found: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, value in model.state_dict().items():
        key = value.data_ptr(), value.shape, value.stride(), value.dtype  # a transposed view holds other values
        if value.numel() and key in names:
            tied[name] = names[key]
            continue
        names[key] = name
        found[name] = value
    return found, tied


def map_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What every changed module is."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QExperts):
            grids = {
                key: _named(cast(Twin, cast(nn.ModuleList, stack)[0]).grid) for key, stack in module.stacks.items()
            }
            inputs = cast(Twin, cast(nn.ModuleList, next(iter(module.stacks.values())))[0]).inputs
            found[name] = {"experts": grids, "activations": inputs.kind if inputs else None}
        elif isinstance(module, Beside):
            kind = module.rest.inputs.kind if module.rest.inputs else None
            n = module.columns.numel()
            found[name] = {"grid": _named(module.rest.grid), "activations": kind, "salient": n}
        elif isinstance(module, Twin) and module.alone and not _of_experts(model, name):
            found[name] = {"grid": _named(module.grid), "activations": module.inputs.kind if module.inputs else None}
        elif getattr(module, "quantized", False) is True:
            found[name] = {"outputs": cast(Inputs, module.outputs).kind}
    return found


def _named(grid: Grid) -> str:
    """The name that a grid is found by again. Raises OutputError when it has none."""
    name = grid_name(grid)
    try:
        known = grid_named(name) == grid
    except RecipeError:
        known = False
    if not known:
        raise OutputError(f"No name stands for the grid {grid}, so it cannot be written down.")
    return name


def _of_experts(model: nn.Module, name: str) -> bool:
    parent, _, _ = name.partition(".stacks.")
    return parent != name and isinstance(model.get_submodule(parent), QExperts)


def shape_as(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a model the twins that the map names, with empty codes."""
    made: dict[int, nn.Module] = {}
    ties = Ties()
    for name, entry in modules.items():
        module = model.get_submodule(name)
        if "outputs" in entry:
            quantize_outputs(module, entry["outputs"])
            continue
        if "experts" in entry:
            twin: nn.Module = QExperts(
                module, {key: grid_named(each) for key, each in entry["experts"].items()}, entry["activations"]
            )
        else:
            found = twin_of(name, module, grid_named(entry["grid"]), entry["activations"])
            if isinstance(found, str) or found[0] is None:
                raise ModelError(f"{name} cannot be on {entry['grid']} ({found}).")
            twin = found[0]
            if "salient" in entry:
                twin = _empty_beside(twin, int(entry["salient"]))
        for each in twin.modules():
            if isinstance(each, Twin):
                ties.freeze(each, lambda each=each: _empty(each.grid, each.matrix.shape))  # type: ignore[misc]
        made[id(module)] = twin
    swap(model, made)


def _empty_beside(twin: nn.Module, n: int) -> Beside:
    if not isinstance(twin, QLinear | QConv1D):
        raise ModelError(f"{type(twin).__name__} has no input channels beside it.")
    side = torch.empty((twin.matrix.shape[0], n), dtype=twin.weight.dtype, device="meta")
    return Beside(twin, torch.empty(n, dtype=torch.int64, device="meta"), side)


def _empty(grid: Grid, shape: torch.Size) -> Frozen:
    rows, cols = shape
    specs = buffer_specs(grid, (rows, cols))
    buffers = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    return Frozen(Packed(grid, (rows, cols), buffers))


def _stored_names(model: nn.Module) -> set[str]:
    found = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Frozen | Inputs):
            found |= {f"{name}.{key}" for key in module._buffers}
    return found
