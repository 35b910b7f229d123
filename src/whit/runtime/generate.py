"""Text from a model, piece by piece.

What people will run a GGUF file with is llama.cpp, so that is what answers for one, not an implementation of ours: a
file that speaks here speaks there. Folders answer through live modules.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from whit.errors import RecipeError
from whit.runtime.answer import Generation, Settings, Timings, check_text
from whit.runtime.choose import prepare

TEMPLATE_TOKENS = 1024  # room for what a chat template adds around a prompt


def generate(
    path: str | Path,
    prompt: str,
    n_tokens: int = 128,
    raw: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    anyway: bool = False,
) -> Generation:
    """Let a model answer a prompt.

    path         a GGUF file, or what `open_model` takes: folders of every format, hub ids, built-in names
    n_tokens     at most so many tokens
    raw          continue the prompt as it stands; otherwise a chat template of the model is applied to it
    temperature  0 always takes the likeliest token; above, tokens are drawn with `seed`
    threads      processor cores to use; None for all. On a busy machine fewer are much faster: they wait for each other
    anyway       load even what does not fit in the memory that is free
    Returns an iterator over the pieces of the answer; its `timings` are there when it has ended. Loading
    starts with the first piece. Raises MissingPackageError for a file without xllamacpp, BrokenFileError for one that
    cannot be loaded, RecipeError for a request that makes no sense or does not fit the memory or the model's context.

        for piece in generate(Path("small.gguf"), "Why is the sky blue?"):
            print(piece, end="")
    """
    if not prompt:
        raise RecipeError("The prompt is empty; give the model something to answer or continue.")
    check_text(prompt, "The prompt")
    settings = Settings(n_tokens, temperature, seed)
    # Room for prompt and answer, but no more than the model reads. Its memory is taken at once, so the model's full
    # length (often 128k) would cost gigabytes for a short answer. A token is at least one byte.
    opened = prepare(path, len(prompt.encode()) + TEMPLATE_TOKENS + n_tokens, threads, anyway)

    def pieces() -> Generator[str, None, Timings]:
        with closing(opened()) as runtime:
            chat = not raw and runtime.has_template
            asked = [{"role": "user", "content": prompt}] if chat else prompt
            return (yield from _through(runtime.answer(asked, settings)))

    return Generation(pieces())


def _through(answer: Generation) -> Generator[str, None, Timings]:
    """Its pieces, then its timings."""
    with closing(answer):
        yield from answer
    return answer.timings
