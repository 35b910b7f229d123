"""`whit serve FILE`: a model for other programs, over HTTP."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from whit.errors import RecipeError
from whit.runtime.serve import Serving, serve


def command(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together, per request.")] = 4096,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", help="Tokens of an answer whose request names no number.")
    ] = 1024,
    slots: Annotated[int, typer.Option(help="Requests that are worked on at once.")] = 4,
    timeout: Annotated[int, typer.Option(help="Seconds without a byte that end a connection.")] = 30,
    threads: Annotated[int | None, typer.Option(help="Processor cores to use, by default all.")] = None,
) -> None:
    """Serve a GGUF file with OpenAI's interface, through llama.cpp's own server."""
    if file.is_dir():
        raise RecipeError(f"{file} is a folder, whit serves GGUF files. For folders: vllm serve {file} --host {host}")
    serving = Serving(host, port, context, tokens, slots, timeout)
    if not serving.local:
        print(f"warning: whoever reaches {host} can use this model; there is no password.", file=sys.stderr)
    with closing(serve(file, serving, threads)) as runtime:
        if not runtime.has_template:
            print("note: no chat template in the file; /v1/completions is what it is good for.", file=sys.stderr)
        print(f"{file.stem} at {runtime.wait()}/v1; Ctrl-C ends it", file=sys.stderr, flush=True)
        try:
            while not runtime.exited():
                time.sleep(0.2)
        except KeyboardInterrupt:
            print("whit: the server has ended.", file=sys.stderr)
            return
        raise runtime.failure()
