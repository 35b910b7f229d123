"""What a person may type as a model: a folder, a GGUF file, a hub id or a built-in name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from whit.checkpoints.folder import open_folder, read_config
from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.hub import beside, download, headers, looks_like_hub_id
from whit.checkpoints.quantized import CONFIG, decoded
from whit.checkpoints.source import TensorSource
from whit.errors import ModelError
from whit.models.architecture import from_gguf, turned_names
from whit.models.builtin import BUILTIN
from whit.models.model import Model

LIVE = "whit.json"  # beside the tensors of a live model


def open_model(text: str | Path, fetch: bool = True) -> Model:
    """Open a model; only headers are read.

    text   a built-in name, a path to a Hugging Face folder or a GGUF file, or a hub id
    fetch  download a hub model into the local cache; otherwise only its headers, and its tensors cannot be read
    Raises ModelError (BrokenFileError, UnknownArchitectureError) with what to do.
    """
    name, path = str(text), Path(text).expanduser()
    if name in BUILTIN:
        return BUILTIN[name]()
    if path.is_dir():
        return _open_folder(name, path)
    if path.is_file():
        return _open_file(name, path)
    if looks_like_hub_id(name) and not path.parent.is_dir():
        return _open_folder(name, download(name)) if fetch else _model(name, *headers(name))
    raise ModelError(
        f"{name}: no such file or folder. A model is a Hugging Face folder, a .gguf file, a hub id (owner/name) "
        f"or a built-in name ({', '.join(BUILTIN)})."
    )


def open_headers(text: str) -> Model:
    """As `open_model`, but of a hub model only headers, configuration and tokenizer are fetched.

    Raises ModelError as `open_model` does.
    """
    model = open_model(text, fetch=False)
    if model.tokenizer_dir is None and not model.gguf_metadata:
        return replace(model, tokenizer_dir=beside(text))
    return model


def _open_folder(label: str, folder: Path) -> Model:
    if (folder / LIVE).is_file():
        raise ModelError(f"{label} holds a live model (whit.save): whit.load(folder) opens it in Python.")
    return _model(label, read_config(folder), *open_folder(folder), folder)


def _model(
    label: str, config: dict[str, Any], tensors: TensorSource, n_bytes: int, folder: Path | None = None
) -> Model:
    """With quantized layers decoded, if there are any."""
    quantization = config.get(CONFIG)
    if quantization is None:
        return Model(label, config, tensors, n_bytes, tokenizer_dir=folder)
    if not isinstance(quantization, dict):
        raise ModelError(f"{label}: quantization_config in config.json is not an object.")
    config = {key: value for key, value in config.items() if key != CONFIG}
    floats = decoded(tensors, quantization, turned_names(config))
    return Model(label, config, floats, n_bytes, tokenizer_dir=folder, quantization=quantization)


def _open_file(label: str, path: Path) -> Model:
    if path.suffix == ".safetensors":
        raise ModelError(f"{path}: give the folder that holds it and config.json, not the weight file alone.")
    file = GGUFFile(path)
    config, tensors = from_gguf(file.metadata, file)
    return Model(
        label,
        config,
        tensors,
        file.n_bytes,
        gguf_path=path,
        gguf_metadata=file.metadata,
        gguf_types=file.types,
        gguf_tensors=file,
    )
