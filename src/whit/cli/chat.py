"""`whit chat FILE`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from whit.errors import RecipeError
from whit.runtime.answer import Settings, Timings
from whit.runtime.llama import LlamaRuntime, longest_context

HELP = "/stats speed of the last answer, /reset a new conversation, /quit the end. Ctrl-C stops an answer."


def command(
    file: Annotated[Path, typer.Argument(help="A GGUF file with a chat template.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="At most so many tokens per answer.")] = 512,
    context: Annotated[int, typer.Option(help="Tokens of the whole conversation that fit.")] = 4096,
    system: Annotated[str, typer.Option(help="An instruction that stands before the conversation.")] = "",
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Where drawing starts when the temperature is above 0.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Processor cores to use, by default all.")] = None,
) -> None:
    """Talk with a GGUF file, through llama.cpp's runtime."""
    settings = Settings(tokens, temperature, seed)
    if context < 1:
        raise RecipeError(f"A context of {context} tokens holds nothing; ask for 1 or more.")
    with closing(LlamaRuntime(file, min(context, longest_context(file)), threads)) as runtime:
        if not runtime.has_template:
            raise RecipeError(
                f"{file} has no chat template: it continues texts and holds no conversations. "
                f'Try `whit run {file} --raw "..."`, or a file made from an instruction-tuned model.'
            )
        runtime.wait()
        _talk(runtime, [{"role": "system", "content": system}] if system else [], settings)


def _talk(runtime: LlamaRuntime, start: list[dict[str, str]], settings: Settings) -> None:
    messages, last = list(start), None
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages, last = list(start), None
        elif line == "/stats":
            print(_stats(last), file=sys.stderr)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                text, last = _answer(runtime, asked, settings)
            except RecipeError as error:  # too long, most of the time: what was said before still holds
                print(f"{error} /reset begins anew.", file=sys.stderr)
                continue
            messages = [*asked, {"role": "assistant", "content": text}]


def _answer(runtime: LlamaRuntime, asked: list[dict[str, str]], settings: Settings) -> tuple[str, Timings | None]:
    pieces: list[str] = []
    answer = runtime.answer(asked, settings)
    with closing(answer):
        try:
            for piece in answer:
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:  # what has been said so far is the answer
            print(flush=True)
            return "".join(pieces), None
    print(flush=True)
    return "".join(pieces), answer.timings


def _stats(took: Timings | None) -> str:
    if took is None:
        return "no complete answer yet"
    return (
        f"prompt {took.prompt_tokens} new tokens at {took.prompt_tokens_per_second:.1f}/s, "
        f"answer {took.tokens} tokens at {took.tokens_per_second:.1f}/s"
    )
