"""`whit run MODEL "prompt"`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from whit.runtime.generate import generate

MODEL = "A GGUF file, a folder of any format, a hub id (owner/name) or a built-in name (smollm2-135m)."
ANYWAY = "Load it even if the memory that is free looks too small."


def command(
    model: Annotated[str, typer.Argument(help=MODEL)],
    prompt: Annotated[str, typer.Argument(help="What to answer, or with --raw what to continue.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Write at most so many tokens.")] = 128,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, even if the model has a chat template.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token, so that files can be compared.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Where drawing starts when the temperature is above 0.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="Processor cores to use, by default all; fewer are faster on a busy machine.")
    ] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help=ANYWAY)] = False,
) -> None:
    """Let a model answer a prompt: a GGUF file through llama.cpp's runtime, a folder as a live model."""
    answer = generate(model, prompt, tokens, raw, temperature, seed, threads, anyway)
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
