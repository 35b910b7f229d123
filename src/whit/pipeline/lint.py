"""Would a runtime load these files, and compute what they say? Looked at without the runtime.

Rules are those of the loaders of transformers, vLLM and llama.cpp as published in 2026 (docs/gpu.md names them). What a
rule cannot see, such as a kernel that a particular card lacks, is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whit.checkpoints.folder import open_folder, read_config
from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.quantized import CONFIG
from whit.checkpoints.schemes import GPTQ_VERSIONS, ConfigGroups, gptq_layout
from whit.checkpoints.source import TensorSource
from whit.errors import WhitError
from whit.layouts.compressed import is_dense
from whit.layouts.gptq import BITS as GPTQ_BITS
from whit.layouts.words import WORD
from whit.models.open import open_model

TRANSFORMERS, VLLM, LLAMA = "transformers", "vLLM", "llama.cpp"
RUNTIMES = (TRANSFORMERS, VLLM, LLAMA)
SIZES = (-1, 32, 64, 128)  # groups of vLLM's fast kernels
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that vLLM multiplies as one
NEEDED = ("tokenizer.ggml.model", "tokenizer.ggml.tokens")
ALWAYS_BITS = (4, 8)  # of packed integers in every version of vLLM
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    runtimes  that it concerns
    stops     whether they refuse the file, or compute something else than it says; otherwise it is a warning
    what      in one sentence, with where
    remedy    what to do
    """

    runtimes: tuple[str, ...]
    stops: bool
    what: str
    remedy: str


def lint(path: Path) -> list[Finding]:
    """All findings for a GGUF file or a folder, none when every runtime that reads its kind loads it.

    Raises ModelError or BrokenFileError when there is nothing to look at.
    """
    if path.is_dir():
        return list(_folder(path))
    return list(_gguf(path))


def _gguf(path: Path) -> Iterator[Finding]:
    file = GGUFFile(path)
    for key in NEEDED:
        if key not in file.metadata:
            yield Finding((LLAMA,), True, f"the metadata has no {key}", "write the file again from the original model")
    try:
        open_model(path)
    except WhitError as error:
        yield Finding((LLAMA, TRANSFORMERS), True, str(error), "get the file again, or write it from the original")
    vllm = "vLLM reads GGUF files through its plugin alone, and not every architecture"
    yield Finding((VLLM,), False, vllm, "whit convert FILE -o FOLDER --format gptq")


def _folder(path: Path) -> Iterator[Finding]:
    config, (tensors, _) = read_config(path), open_folder(path)
    yield Finding((LLAMA,), True, "llama.cpp reads GGUF files alone", "whit convert FOLDER -o FILE.gguf --format gguf")
    if not any((path / name).is_file() for name in TOKENIZERS):
        yield Finding((TRANSFORMERS, VLLM), False, "there is no tokenizer in the folder", "copy it from the original")
    quantization = config.get(CONFIG)
    stored = _layers(tensors)
    if quantization is None:
        if stored:
            what = f"{len(stored)} layers are quantized ({stored[0]}), but config.json has no quantization_config"
            yield Finding((TRANSFORMERS, VLLM), True, what, "add it, or get the folder again")
        return
    try:
        opened = open_model(path).tensors
        for name in opened.names():
            opened.info(name)
    except WhitError as error:
        yield Finding((TRANSFORMERS, VLLM), True, str(error), "quantize the original again")
        return
    method = quantization.get("quant_method")
    rules = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
    if method == "whit":
        remedy = "whit convert FOLDER -o OUT --format compressed-tensors (or f16)"
        yield Finding((TRANSFORMERS, VLLM), True, "this is Whit's own format, which Whit alone reads", remedy)
    elif method in rules:
        yield from rules[method](quantization, tensors, stored)
    if config.get("tie_word_embeddings") and any(layer.endswith("lm_head") for layer in stored):
        what = "lm_head is quantized, but config.json ties it to the embedding"
        yield Finding((TRANSFORMERS, VLLM), True, what, "set tie_word_embeddings to false, or keep the head in float")


def _layers(tensors: TensorSource) -> list[str]:
    """Quantized layers, by the tensors they have."""
    marks = ("qweight", "weight_packed", "weight_codes", "weight_ggml", "weight_scale")
    found = [name.rpartition(".")[0] for name in tensors.names() if name.rpartition(".")[2] in marks]
    return list(dict.fromkeys(found))


def _gptq(config: Mapping[str, Any], tensors: TensorSource, layers: Sequence[str]) -> Iterator[Finding]:
    layout, size = gptq_layout(config), int(config.get("group_size", -1))
    schemes: dict[str, tuple[int, int]] = {}
    there, symmetric = set(tensors.names()), True
    lying, wrapped, unindexed, odd, strange = (list[str]() for _ in range(5))
    for layer in layers:
        rows, groups = tensors.info(f"{layer}.scales").shape[1], tensors.info(f"{layer}.scales").shape[0]
        qzeros = tensors.read(f"{layer}.qzeros")
        bits = qzeros.shape[1] * WORD // rows
        cols = tensors.info(f"{layer}.qweight").shape[0] * WORD // bits
        schemes[layer] = bits, cols // groups if groups > 1 else -1
        zeros = layout.zeros(qzeros, bits, rows)
        symmetric &= bool((zeros == 1 << bits - 1).all())
        if layout.mislabelled(qzeros, bits, rows):
            lying.append(layer)
        elif layout.version == 1 and bool((zeros == 0).any()):
            wrapped.append(layer)
        if f"{layer}.g_idx" not in there:
            unindexed.append(layer)
        if cols % groups:
            odd.append(f"{layer} ({cols} inputs in {groups} groups)")
        if bits not in GPTQ_BITS:
            strange.append(layer)
    if strange:
        what = f"{len(strange)} layers ({strange[0]}) have a number of bits that readers do not know"
        yield Finding((TRANSFORMERS, VLLM), True, what, "quantize the original again, to 2, 3, 4 or 8 bits")
    if lying:
        label, other = sorted(GPTQ_VERSIONS, key=lambda name: GPTQ_VERSIONS[name] != layout.version)
        what = f"{len(lying)} layers ({lying[0]}) have zero points of {other}, but checkpoint_format says {label}"
        yield Finding((TRANSFORMERS, VLLM), True, f"{what}: every weight is off by one step", f"set it to {other}")
    if wrapped:
        what = f"{len(wrapped)} layers ({wrapped[0]}) have zero points that wrap around in version 1"
        yield Finding((TRANSFORMERS, VLLM), False, what, "whit convert writes version 2 for asymmetric files")
    if unindexed:
        what = f"{len(unindexed)} layers ({unindexed[0]}) have no g_idx"
        yield Finding((TRANSFORMERS,), bool(config.get("desc_act")), what, "whit convert FOLDER -o OUT --format gptq")
    if odd:
        yield Finding((TRANSFORMERS, VLLM), True, f"groups do not divide the inputs: {odd[0]}", "use smaller groups")
    if not config.get("dynamic"):
        differing = [layer for layer, (_, found) in schemes.items() if found != size]
        if differing:
            first = schemes[differing[0]][1]
            what = f"{len(differing)} layers ({differing[0]}) have groups of {first}, config.json says {size}"
            yield Finding((TRANSFORMERS, VLLM), True, what, "name them in `dynamic`, or use one size")
    if not symmetric or {bits for bits, _ in schemes.values()} - set(ALWAYS_BITS):
        what = "zero points, or other than 4 and 8 bits: vLLM has no fast kernel for it, and none at all on CPUs"
        yield Finding((VLLM,), False, what, "quantize symmetrically to 4 or 8 bits, or whit convert --format awq")
    yield from _vllm_groups({layer: found for layer, (_, found) in schemes.items()})
    yield from _siblings({layer: str(found) for layer, found in schemes.items()})


def _awq(config: Mapping[str, Any], tensors: TensorSource, layers: Sequence[str]) -> Iterator[Finding]:
    size = int(config.get("group_size", 128))
    sizes = {}
    for layer in layers:
        groups, cols = tensors.info(f"{layer}.scales").shape[0], tensors.info(f"{layer}.qweight").shape[0]
        sizes[layer] = cols // groups if groups > 1 else -1
    other = [layer for layer, found in sizes.items() if found != size]
    if other:
        what = f"{len(other)} layers ({other[0]}) have groups of {sizes[other[0]]}, config.json says {size}"
        remedy = "AWQ has one group size; whit convert FOLDER -o OUT --format compressed-tensors"
        yield Finding((TRANSFORMERS, VLLM), True, what, remedy)
    yield from _vllm_groups(sizes)


def _compressed(config: Mapping[str, Any], tensors: TensorSource, layers: Sequence[str]) -> Iterator[Finding]:
    groups = ConfigGroups(config)
    older, schemes, sizes = list[str](), dict[str, str](), dict[str, int]()
    unusual, offset = list[str](), list[str]()
    for layer in layers:
        form, weights = groups.group(layer)
        bits, size = int(weights.get("num_bits", 0)), weights.get("group_size")
        schemes[layer] = f"{form} {sorted((key, str(value)) for key, value in weights.items())}"
        if weights.get("strategy") == "group":
            sizes[layer] = int(size or -1)
        if form != "pack-quantized":
            continue
        words = tensors.info(f"{layer}.weight_packed").shape[1]
        cols = int(tensors.read(f"{layer}.weight_shape")[1])
        if not is_dense(words, bits, cols):
            older.append(layer)
        if not weights.get("symmetric", True):
            offset.append(layer)
        if bits not in ALWAYS_BITS:
            unusual.append(layer)
    if both := set(unusual) & set(offset):
        what = f"{len(both)} layers ({min(both)}) have zero points at other than 4 and 8 bits, which vLLM does not run"
        yield Finding((VLLM,), True, what, "quantize symmetrically")
    elif unusual:
        what = f"{len(unusual)} layers ({unusual[0]}) have other than 4 and 8 bits: new versions of vLLM on GPUs alone"
        yield Finding((VLLM,), False, what, "use a recent vLLM, or 4 or 8 bits")
    if offset:
        what = "packed zero points: compressed-tensors 0.20 in transformers expects them unpacked and stops"
        yield Finding((TRANSFORMERS,), True, what, "quantize symmetrically, or whit convert --format gptq")
    if older:
        what = f"{len(older)} layers ({older[0]}) are packed as before May 2026, which newer versions read wrongly"
        yield Finding((TRANSFORMERS, VLLM), True, what, "whit convert FOLDER -o OUT --format compressed-tensors")
    if "lm_head" not in config.get("ignore", ()) and "lm_head" not in layers:
        what = "`ignore` does not name lm_head, which is not quantized; targets of a class mean it too"
        yield Finding((TRANSFORMERS,), True, what, "add lm_head to `ignore`")
    yield from _vllm_groups(sizes)
    yield from _siblings(schemes)


def _vllm_groups(sizes: Mapping[str, int]) -> Iterator[Finding]:
    odd = {layer: size for layer, size in sizes.items() if size not in SIZES}
    if odd:
        layer, size = next(iter(odd.items()))
        what = f"{len(odd)} layers ({layer}) have groups of {size}; fast kernels know 32, 64, 128 and whole rows"
        yield Finding((VLLM,), False, what, "use one of these sizes")


def _siblings(schemes: Mapping[str, str]) -> Iterator[Finding]:
    for family in FUSED:
        for layer in schemes:
            parent, _, name = layer.rpartition(".")
            if name != family[0]:
                continue
            found = [schemes.get(f"{parent}.{each}") for each in family]
            if len(set(found)) > 1:
                what = f"{parent}: {', '.join(family)} are one matrix in vLLM, but are stored differently"
                yield Finding((VLLM,), True, what, "give them the same grid")
                break
