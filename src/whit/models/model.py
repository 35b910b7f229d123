"""A model that was opened but not loaded: its configuration and its tensors under transformers' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whit.checkpoints.gguf import GGUFFile, GGUFType
from whit.checkpoints.source import TensorSource

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """An opened model; only headers have been read.

    label            what the user typed
    config           the content of config.json (rebuilt from metadata when the model is a GGUF file)
    tensors          tensors under the names that transformers gives them on disk
    n_bytes          size of the weight files on disk
    tokenizer_dir    folder with tokenizer.json or tokenizer.model and tokenizer_config.json, if there is one
    gguf_path        the file, when the model is a GGUF file
    gguf_metadata    metadata of the GGUF file that the model or its tokenizer comes from, else empty
    gguf_types       the GGUF types of that metadata, so that it can be written back unchanged
    gguf_tensors     its tensors under GGUF names when the weights are that file's own, else None
    quantization     the quantization_config of a folder of quantized weights, else empty; `tensors` are decoded ones
    """

    label: str
    config: Mapping[str, Any]
    tensors: TensorSource
    n_bytes: int
    tokenizer_dir: Path | None = None
    gguf_path: Path | None = None
    gguf_metadata: Metadata = field(default_factory=dict)
    gguf_types: Mapping[str, GGUFType] = field(default_factory=dict)
    gguf_tensors: GGUFFile | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict)


def bits_per_weight(model: Model) -> float:
    """Bits of all weight files, headers and tokenizer of a GGUF file included, per weight in them."""
    source = model.tensors if model.gguf_tensors is None else model.gguf_tensors
    return 8 * model.n_bytes / sum(math.prod(source.info(name).shape) for name in source.names())
