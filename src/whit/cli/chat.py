"""`whit chat MODEL`: a conversation in the terminal."""

from __future__ import annotations

import io
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated

import typer

from whit.cli.run import ANYWAY, MODEL
from whit.errors import RecipeError
from whit.memory import GB
from whit.runtime.answer import Runtime, Settings, Timings, check_text
from whit.runtime.choose import prepare

HELP = "/stats speed of the last answer and memory, /reset a new conversation, /quit the end. Ctrl-C stops an answer."


@dataclass(frozen=True)
class _Took:
    """What the last answer took.

    first_seconds  from the question to the first text of the answer
    """

    timings: Timings
    first_seconds: float


def command(
    model: Annotated[str, typer.Argument(help=f"{MODEL} It needs a chat template.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="At most so many tokens per answer.")] = 512,
    context: Annotated[int, typer.Option(help="Tokens of the whole conversation that fit.")] = 4096,
    system: Annotated[str, typer.Option(help="An instruction that stands before the conversation.")] = "",
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Where drawing starts when the temperature is above 0.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Processor cores to use, by default all.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help=ANYWAY)] = False,
) -> None:
    """Talk with a model: a GGUF file through llama.cpp's runtime, a folder as a live model."""
    check_text(system, "--system")
    settings = Settings(tokens, temperature, seed)
    with closing(prepare(model, context, threads, anyway, remember=True)()) as runtime:
        if not runtime.has_template:
            raise RecipeError(
                f"{model} has no chat template: it continues texts and holds no conversations. "
                f'Try `whit run {model} --raw "..."`, or one made from an instruction-tuned model.'
            )
        _talk(runtime, [{"role": "system", "content": system}] if system else [], settings)


def _talk(runtime: Runtime, start: list[dict[str, str]], settings: Settings) -> None:
    messages, last = list(start), None
    print(HELP, file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a bad byte is seen in its line, and no other line is lost
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
            print(_stats(last, runtime), file=sys.stderr)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            try:
                check_text(line, "The line")
            except RecipeError as error:
                print(error, file=sys.stderr)
                continue
            asked = [*messages, {"role": "user", "content": line}]
            try:
                text, last = _answer(runtime, asked, settings)
            except RecipeError as error:  # too long, most of the time: what was said before still holds
                print(f"{error} /reset begins anew.", file=sys.stderr)
                continue
            messages = [*asked, {"role": "assistant", "content": text}]


def _answer(runtime: Runtime, asked: list[dict[str, str]], settings: Settings) -> tuple[str, _Took | None]:
    pieces: list[str] = []
    asked_at, first = time.monotonic(), 0.0
    answer = runtime.answer(asked, settings)
    with closing(answer):
        try:
            for piece in answer:
                if piece and not first:
                    first = time.monotonic() - asked_at
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:  # what has been said so far is the answer
            print(flush=True)
            return "".join(pieces), None
    print(flush=True)
    return "".join(pieces), _Took(answer.timings, first)


def _stats(took: _Took | None, runtime: Runtime) -> str:
    memory = f"memory {runtime.resident() / GB:.2f} GB"
    if took is None:
        return f"no complete answer yet; {memory}"
    timings = took.timings
    return (
        f"prompt {timings.prompt_tokens} new tokens at {timings.prompt_tokens_per_second:.1f}/s, "
        f"first text after {took.first_seconds:.2f} s, "
        f"answer {timings.tokens} tokens at {timings.tokens_per_second:.1f}/s; {memory}"
    )
