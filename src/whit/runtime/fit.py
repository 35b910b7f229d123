"""Whether a model will fit in the memory that is free, before anything is loaded; if not, what would.

The figures are those of whit.memory: weights as they lie in memory; keys and values of the whole context; working
space.
Left out: what other programs will take meanwhile, and memory of accelerators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.quantized import QuantizedTensors
from whit.checkpoints.stacked import METHOD
from whit.errors import ModelError, RecipeError
from whit.memory import GB, RunMemory, run_bytes
from whit.models.model import Model
from whit.models.open import open_model
from whit.shape import Shape, shape_from_config

STEP = 256  # contexts that are suggested are multiples of it
LIVE_BITS = 32  # of a cached number in a live model; llama.cpp keeps 16
CGROUP = Path("/sys/fs/cgroup")
Needs = Callable[[int], RunMemory]  # of a context


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that can be taken without swapping: the machine's, or what is left of a container's limit.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst, memory.max, memory.current and memory.stat.
    """
    free = int(psutil.virtual_memory().available)
    try:
        most = int((cgroup / "memory.max").read_text())  # "max", no number, where there is no limit
        taken = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return min(free, max(0, most - taken + int(stat.get("inactive_file", 0))))


def gguf_needs(path: Path, slots: int = 1) -> Needs | None:
    """Bytes that llama.cpp takes for a file, by tokens of context; None when the file does not say enough.

    slots  contexts at once
    Raises ModelError for files that are none.
    """
    file = GGUFFile(path)
    try:
        shape: Shape | None = shape_from_config(open_model(path).config)
    except ModelError:  # llama.cpp runs architectures that no table here describes
        shape = gguf_shape(file.metadata)
    return None if shape is None else lambda context: run_bytes(file.n_bytes, shape, context, slots)


def gguf_shape(metadata: Mapping[str, Any]) -> Shape | None:
    """The shape that a file's own keys describe, whatever its architecture; None when they do not."""
    architecture = metadata.get("general.architecture")

    def whole(name: str, default: int = 0) -> int:
        value = metadata.get(f"{architecture}.{name}", default)
        value = max(value, default=default) if isinstance(value, list) else value  # some models differ by layer
        return value if isinstance(value, int) else default

    layers, hidden, heads = whole("block_count"), whole("embedding_length"), whole("attention.head_count")
    if min(layers, hidden, heads) < 1:
        return None
    vocab = len(metadata.get("tokenizer.ggml.tokens") or ()) or whole("vocab_size")
    head_dim = whole("attention.key_length", hidden // heads)
    wide = whole("feed_forward_length", 4 * hidden)
    return Shape(layers, hidden, heads, whole("attention.head_count_kv", heads), head_dim, wide, vocab)


def folder_needs(model: Model) -> Needs | None:
    """Bytes that a live model takes, by tokens of context; None when its configuration does not say enough."""
    try:
        shape = shape_from_config(model.config)
    except ModelError:
        return None
    tensors = model.tensors
    infos = [tensors.info(name) for name in tensors.names()]
    if isinstance(tensors, QuantizedTensors):
        infos = [each for each in infos if not tensors.is_quantized(each.name)]
    floats = [each for each in infos if each.dtype in ("F16", "BF16", "F32", METHOD)]  # stacks of experts among them
    # What is not quantized is opened in float32; codes stay as they are.
    weights = model.n_bytes + sum(4 * math.prod(each.shape) - each.n_bytes for each in floats)
    return lambda context: run_bytes(weights, shape, context, cache_bits=LIVE_BITS)


def check_fits(label: str, needs: Needs, context: int, free: int) -> None:
    """Raises RecipeError when more memory is needed than is free; the message says what would fit."""
    wanted = needs(context)
    if wanted.total <= free:
        return
    if needs(STEP).total <= free:
        fits = STEP
        while needs(fits + STEP).total <= free:
            fits += STEP
        advice = f"--context {fits} would fit."
    else:
        advice = "No context fits: take a smaller file (whit quantize --fit makes one of a size you choose)."
    raise RecipeError(
        f"{label}: {wanted.total / GB:.2f} GB of memory are needed (weights {wanted.weights / GB:.2f}, keys "
        f"and values of {context} tokens {wanted.kv_cache / GB:.2f}, work {wanted.working / GB:.2f}), "
        f"{free / GB:.2f} GB are free. {advice} --anyway tries all the same."
    )
