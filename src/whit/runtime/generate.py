"""Text from a GGUF file through llama.cpp's runtime, piece by piece.

What people will run is llama.cpp, so that is what answers here, not an implementation of ours: a file that speaks
here speaks there.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from whit.checkpoints.gguf import GGUFFile
from whit.errors import RecipeError
from whit.runtime.answer import Generation, Settings, Timings
from whit.runtime.llama import LlamaRuntime, check_installed, longest_context

TEMPLATE_TOKENS = 1024  # room for what a chat template adds around a prompt


def generate(
    path: Path,
    prompt: str,
    n_tokens: int = 128,
    raw: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
) -> Generation:
    """Let a GGUF file answer a prompt.

    n_tokens     at most so many tokens
    raw          continue the prompt as it stands; otherwise a chat template in the file is applied to it
    temperature  0 always takes the likeliest token; above, tokens are drawn with `seed`
    threads      processor cores to use; None for all. On a busy machine fewer are much faster: they wait for each other
    Returns an iterator over the pieces of the answer; its `timings` are there when it has ended. The runtime starts
    with the first piece. Raises MissingPackageError without xllamacpp, BrokenFileError for a file that cannot be
    loaded, RecipeError for a request that makes no sense or does not fit the model's context.

        for piece in generate(Path("small.gguf"), "Why is the sky blue?"):
            print(piece, end="")
    """
    check_installed()
    if not prompt:
        raise RecipeError("The prompt is empty; give the model something to answer or continue.")
    settings = Settings(n_tokens, temperature, seed)
    if threads is not None and threads < 1:
        raise RecipeError(f"{threads} threads cannot work; ask for 1 or more.")
    # Room for prompt and answer, but no more than the model reads. Its memory is taken at once, so the model's full
    # length (often 128k) would cost gigabytes for a short answer. A token is at least one byte.
    n_ctx = min(longest_context(path), len(prompt.encode()) + TEMPLATE_TOKENS + n_tokens)
    chat = not raw and "tokenizer.chat_template" in GGUFFile(path).metadata

    def pieces() -> Generator[str, None, Timings]:
        with closing(LlamaRuntime(path, n_ctx, threads)) as runtime:
            asked = [{"role": "user", "content": prompt}] if chat else prompt
            return (yield from _through(runtime.answer(asked, settings)))

    return Generation(pieces())


def _through(answer: Generation) -> Generator[str, None, Timings]:
    """Its pieces, then its timings."""
    with closing(answer):
        yield from answer
    return answer.timings
