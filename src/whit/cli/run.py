"""`whit run FILE "prompt"`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from whit.runtime.generate import generate


def command(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    prompt: Annotated[str, typer.Argument(help="What to answer, or with --raw what to continue.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Write at most so many tokens.")] = 128,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, even if the file has a chat template.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token, so that files can be compared.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Where drawing starts when the temperature is above 0.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="Processor cores to use, by default all; fewer are faster on a busy machine.")
    ] = None,
) -> None:
    """Let a GGUF file answer a prompt, through llama.cpp's runtime."""
    answer = generate(file, prompt, n_tokens=tokens, raw=raw, temperature=temperature, seed=seed, threads=threads)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    finally:
        answer.close()
    print(flush=True)
    took = answer.timings
    if took.ended:
        end = ""
    elif took.tokens < tokens:
        end = "; cut off: the model's context is full"
    else:
        end = "; cut off: -n allows a longer answer"
    print(
        f"prompt {took.prompt_tokens} tokens at {took.prompt_tokens_per_second:.1f}/s, "
        f"answer {took.tokens} tokens at {took.tokens_per_second:.1f}/s{end}",
        file=sys.stderr,
    )
