"""Which runtime answers for what a person typed: llama.cpp for a file, a live model for everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from whit.errors import RecipeError
from whit.runtime.answer import Runtime, check_threads
from whit.runtime.fit import check_fits, folder_needs, free_memory, gguf_needs
from whit.runtime.installed import check_llama
from whit.runtime.llama import LlamaRuntime, longest_context


def is_file(text: str | Path) -> bool:
    """Whether llama.cpp is to answer: a GGUF file is meant, there or not."""
    path = Path(text).expanduser()
    return path.is_file() or path.suffix == ".gguf"


def prepare(
    text: str | Path, context: int, threads: int | None = None, anyway: bool = False, remember: bool = False
) -> Callable[[], Runtime]:
    """What opens a model that answers; all that headers can tell has been checked.

    text      a GGUF file, or a folder, hub id or built-in name
    context   tokens of prompt and answer together; never more than the model reads
    threads   processor cores to use; None for all
    anyway    load even what does not fit in the memory that is free
    remember  keep what was read for a prompt that begins alike; a file's runtime always does
    Raises RecipeError for values that make no sense and for what does not fit, ModelError, MissingPackageError.
    """
    if context < 1:
        raise RecipeError(f"A context of {context} tokens holds nothing; ask for 1 or more.")
    check_threads(threads)
    if is_file(text):
        check_llama()
        path = Path(text).expanduser()
        context = min(context, longest_context(path))
        needs = gguf_needs(path)
        if needs is not None and not anyway:
            check_fits(str(text), needs, context, free_memory())
        return lambda: LlamaRuntime(path, context, threads)
    from whit.runtime.live import LiveRuntime, described, longest  # they import transformers, which takes seconds

    model = described(text)
    context = min(context, longest(model))
    needs = folder_needs(model)
    if needs is not None and not anyway:
        check_fits(model.label, needs, context, free_memory())
    return lambda: LiveRuntime(model, context, threads, remember)
