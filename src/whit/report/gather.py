"""The measuring behind a report: an original is read once, then file after file is verified beside it.

Nothing here is measured in another way than `whit verify` does; what that command reduces to a few lines is kept.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from os.path import abspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.calibration.text import Text
from whit.checkpoints.imatrix import ImportanceMatrix
from whit.devices import CPU
from whit.errors import BadWeightsError, BrokenFileError, ModelError
from whit.models.architecture import GGUFTensor
from whit.models.model import Model, bits_per_weight
from whit.models.open import open_model
from whit.models.tokenizer import Tokenizer, load_tokenizer
from whit.pipeline.damage import check_shapes
from whit.pipeline.quantize import Progress, model_view
from whit.pipeline.verify import Looked, Original, Verified, looked_at
from whit.report.facts import Coverage, FileFacts, Matrix, Prompt, Report, Said, Seen

WRITTEN = 40  # tokens that every prompt is continued by
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
LONGEST = 200  # characters of what a file says of itself
EMBEDDING = "token_embd.weight"


def gathered(
    files: Sequence[Path],
    original: Model,
    windows: Tensor,
    text: Text,
    importance: tuple[str, ImportanceMatrix] | None = None,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> Report:
    """Measure files beside the original.

    windows     [n, length] int64, of the original's tokenizer, cut from `text`
    importance  the name of an importance matrix, and what is in it
    device      where the models run
    Raises ModelError, before anything is measured, when a file is missing or was made from another model, when the
    original cannot be used, or for two names of one file; TextError as `compare` does. A file that cannot be read or
    run is no error: the report says so.
    """
    started, tell = time.perf_counter(), progress or (lambda done, total, what: None)
    opened = _opened(files, original)
    beside, tokenizer = Original(original, windows, WRITTEN, device), load_tokenizer(original)
    tensors = {tensor.name: tensor for tensor in model_view(original).tensors}
    found, n = [], len(files)
    for done, (path, name) in enumerate(zip(files, distinct(files), strict=True)):
        looked = looked_at(path, beside, _share_of(tell, done, n, name))
        found.append(_file(path, name, opened[path], looked, beside, tokenizer, tensors))
    prompts: tuple[Prompt, ...] = ()
    if any(each.said for each in found):  # otherwise the original has not been read, and need not be
        _, said = beside.read(lambda done, total, what: None)
        prompts = tuple(
            Prompt(tokenizer.decode(prompt), tokenizer.decode(ids))
            for prompt, ids in zip(beside.prompts.tolist(), said.tolist(), strict=True)
        )
    return Report(
        _called(original),
        original.n_bytes,
        bits_per_weight(original),
        text.description,
        windows.shape[0],
        windows.shape[1],
        tuple(found),
        prompts,
        None if importance is None else covered(*importance, tensors),
        version("whit"),
        time.perf_counter() - started,
    )


def covered(name: str, matrix: ImportanceMatrix, tensors: dict[str, GGUFTensor]) -> Coverage:
    """An importance matrix beside the tensors of a model, by GGUF name."""
    asked = [each for each, tensor in tensors.items() if len(tensor.shape) > 1 and not tensor.keep_float]
    seen = []
    for each in asked:
        if each in matrix.means:
            counts, means = matrix.counts[each], matrix.means[each]
            given = means[counts > 0] if len(counts) == len(means) else means
            silent = (given == 0).float().mean().item() if given.numel() else 0.0
            seen.append(Seen(each, tuple(counts.tolist()), silent))
    missing = tuple(each for each in asked if each not in matrix.means and each != EMBEDDING)
    unknown = tuple(printable(each) for each in matrix.means if each not in tensors)
    texts = tuple(printable(str(each)) for each in matrix.datasets)
    return Coverage(printable(name), texts, matrix.n_chunks * matrix.chunk_size, tuple(seen), missing, unknown)


def distinct(files: Sequence[Path]) -> list[str]:
    """A name for every path, the shortest ends that tell them apart. Raises ModelError for two paths of one file."""
    absolute = [Path(abspath(path)) for path in files]
    if twice := [str(path) for path, n in Counter(absolute).items() if n > 1]:
        raise ModelError(f"{twice[0]}: given twice. Give every file once.")
    lengths = [1] * len(files)
    while True:
        names = ["/".join(path.parts[-n:]) for path, n in zip(absolute, lengths, strict=True)]
        often = Counter(map(printable, names))
        longer = [n + (often[printable(name)] > 1) for name, n in zip(names, lengths, strict=True)]
        if longer == lengths or max(lengths) > max(len(path.parts) for path in absolute):
            return [printable(name) for name in names]
        lengths = longer


def printable(text: str) -> str:
    """A text in one line that any page can hold: what does not print, or turns the direction, becomes a mark."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def _called(model: Model) -> str:
    """As it was typed, without the folders around it: a page may be given away."""
    path = Path(model.label)
    return printable(path.resolve().name if path.exists() else model.label)


def _opened(files: Sequence[Path], original: Model) -> dict[Path, Model | None]:
    """Every file from its headers, None for one that cannot be read; the report will say why."""
    view, opened = model_view(original), dict[Path, Model | None]()
    for path in files:
        if not path.exists():
            raise ModelError(f"{path}: no such file or folder. Give what `whit quantize` has written.")
        try:
            opened[path] = written = open_model(path)
            mine = model_view(written)
        except (BrokenFileError, BadWeightsError):
            opened[path] = None
        else:
            check_shapes(written, original, mine, view)
    return opened


def _file(
    path: Path,
    name: str,
    model: Model | None,
    looked: Looked,
    original: Original,
    tokenizer: Tokenizer,
    tensors: dict[str, GGUFTensor],
) -> FileFacts:
    said: tuple[Said, ...] = ()
    verified = _without_folders(looked.verified, path, name)
    if looked.said is not None:
        _, expected = original.read(lambda done, total, what: None)
        pairs = zip(looked.said, expected, strict=True)
        said = tuple(_said(mine, theirs, tokenizer) for mine, theirs in pairs)
    if model is None:
        n_bytes = sum(each.stat().st_size for each in ([path] if path.is_file() else path.iterdir()) if each.is_file())
        return FileFacts(name, "folder" if path.is_dir() else "file", n_bytes, None, verified)
    kind = "GGUF" if model.gguf_tensors is not None else str(model.quantization.get("quant_method") or "floats")
    return FileFacts(
        name,
        printable(kind)[:LONGEST],
        model.n_bytes,
        bits_per_weight(model),
        verified,
        *_making(model),
        _matrices(looked, tensors),
        looked.tokens,
        said,
    )


def _without_folders(verified: Verified, path: Path, name: str) -> Verified:
    """What was found, with the file called as everywhere on the page."""

    def named(text: str) -> str:
        return printable(text.replace(str(path), name))

    word = replace(verified.verdict, why=named(verified.verdict.why))
    return replace(verified, verdict=word, faults=tuple(map(named, verified.faults)))


def _said(mine: Tensor, theirs: Tensor, tokenizer: Tokenizer) -> Said:
    """mine, theirs  [tokens] int64"""
    n = int((mine == theirs).long().cumprod(0).sum())
    whole, same = tokenizer.decode(mine.tolist()), tokenizer.decode(mine[:n].tolist())
    # Where a character is made of several tokens, some of which are alike, the difference begins with it.
    cut = next((k for k, (a, b) in enumerate(zip(whole, same, strict=False)) if a != b), min(len(whole), len(same)))
    return Said(whole[:cut], whole[cut:], n, len(mine)) if n < len(mine) else Said(whole, "", n, n)


def _matrices(looked: Looked, tensors: dict[str, GGUFTensor]) -> tuple[Matrix, ...]:
    if looked.scan is None:
        return ()
    found = []
    for name, damage in looked.scan.damages.items():
        if len(tensors[name].shape) < 2:
            continue
        inside = BLOCK.fullmatch(name)
        found.append(
            Matrix(
                name.removesuffix(".weight"),
                int(inside[1]) if inside else None,
                (inside[2] if inside else name).removesuffix(".weight"),
                looked.scan.types[name],
                looked.scan.bits[name],
                tensors[name].n_weights,
                damage.error,
                damage.expected,
                damage.fault,
            )
        )
    return tuple(found)


def _making(model: Model) -> tuple[str, str]:
    """What a file says of its recipe, and of the importance matrix that was used, in the words of its own metadata."""
    if model.gguf_tensors is None:
        settings = {key: value for key, value in model.quantization.items() if isinstance(value, str | int | float)}
        return _short(", ".join(f"{key} {value}" for key, value in settings.items())), ""
    said = model.gguf_metadata
    origin = [said.get("general.quantized_by"), said.get("whit.recipe")]
    file, text = said.get("quantize.imatrix.file"), said.get("quantize.imatrix.dataset")
    calibration = [
        f"importance matrix {file}" if file else "",
        f"made from {text}" if text else "",
        _counted(said, "quantize.imatrix.entries_count", "entries"),
        _counted(said, "quantize.imatrix.chunks_count", "chunks of text"),
    ]
    return _short("; ".join(str(each) for each in origin if each)), _short(", ".join(filter(None, calibration)))


def _counted(said: Any, key: str, what: str) -> str:
    return f"{said[key]} {what}" if isinstance(said.get(key), int) else ""


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _share_of(tell: Progress, done: int, n: int, name: str) -> Callable[[int, int, str], None]:
    """The progress of one file of n, in thousandths of all."""

    def report(part: int, whole: int, what: str) -> None:
        tell(round(1000 * (done + part / max(1, whole)) / n), 1000, f"{name}: {what}")

    return report
