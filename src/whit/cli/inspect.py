"""`whit inspect PATH`: metadata and tensors with types, shapes and bits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from whit.checkpoints.folder import open_folder, read_config
from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.quantized import CONFIG, decoded
from whit.checkpoints.safetensors import SafetensorsFile
from whit.checkpoints.source import TensorInfo, TensorSource
from whit.errors import ModelError
from whit.models.builtin import SMOLLM2, packaged_smollm2

LONGEST_VALUE = 100
SHOWN_ITEMS = 4


def command(
    path: Annotated[str, typer.Argument(help="A .gguf or .safetensors file, a model folder, or smollm2-135m.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for machines.")] = False,
) -> None:
    """List the metadata and tensors of a file or folder."""
    metadata, tensors, n_bytes = _open(path)
    infos = [tensors.info(name) for name in tensors.names()]
    if as_json:
        print(json.dumps(_as_json(metadata, infos, n_bytes), indent=1, default=str))
        return
    console = Console(highlight=False)
    _print_metadata(console, metadata)
    _print_tensors(console, infos)
    n_weights = sum(math.prod(info.shape) for info in infos)
    bits = f", {8 * n_bytes / n_weights:.3f} bits per weight" if n_weights else ""
    console.print(f"{len(infos)} tensors, {n_weights:,} weights, {n_bytes / 1e6:,.2f} MB{bits}")


def _open(text: str) -> tuple[Mapping[str, Any], TensorSource, int]:
    """Deliberately below the models: a file of an unknown architecture can be looked at too."""
    path = packaged_smollm2() if text == SMOLLM2 else Path(text).expanduser()
    if path.is_dir():
        tensors, n_bytes = open_folder(path)
        config = read_config(path)
        if isinstance(config.get(CONFIG), dict):
            with suppress(ModelError):  # of a kind that is not read: the stored tensors are shown
                return config, decoded(tensors, config[CONFIG]), n_bytes
        return config, tensors, n_bytes
    if path.suffix == ".safetensors":
        return {}, SafetensorsFile(path), path.stat().st_size
    if not path.exists():
        raise ModelError(f"{text}: no such file or folder. Give a .gguf file, a .safetensors file or a model folder.")
    file = GGUFFile(path)
    return file.metadata, file, file.n_bytes


def _print_metadata(console: Console, metadata: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("key", overflow="fold")
    table.add_column("value", overflow="fold")
    for key, value in metadata.items():
        table.add_row(escape(key), escape(_short(value)))
    console.print(table)
    console.print()


def _print_tensors(console: Console, infos: list[TensorInfo]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("type")
    table.add_column("shape")
    table.add_column("bits", justify="right")
    table.add_column("MB", justify="right")
    for info in infos:
        shape = " x ".join(map(str, info.shape))
        table.add_row(escape(info.name), info.dtype, shape, f"{_bits(info):.4g}", f"{info.n_bytes / 1e6:.3f}")
    console.print(table)
    console.print()


def _bits(info: TensorInfo) -> float:
    return 8 * info.n_bytes / max(1, math.prod(info.shape))


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > SHOWN_ITEMS:
        return f"[{', '.join(map(repr, value[:SHOWN_ITEMS]))}, ...] ({len(value):,} items)"
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(str(value)):,} characters)"


def _as_json(metadata: Mapping[str, Any], infos: list[TensorInfo], n_bytes: int) -> dict[str, Any]:
    tensors = [
        {"name": info.name, "type": info.dtype, "shape": info.shape, "bytes": info.n_bytes, "bits": _bits(info)}
        for info in infos
    ]
    return {"bytes": n_bytes, "metadata": dict(metadata), "tensors": tensors}
