"""`whit serve MODEL`: a model for other programs, over HTTP."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from whit.cli.run import ANYWAY, MODEL
from whit.runtime.installed import check_server


def command(
    model: Annotated[str, typer.Argument(help=MODEL)],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together, per request.")] = 4096,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Tokens of an answer, at most.")] = 1024,
    slots: Annotated[int, typer.Option(help="Requests that are worked on at once; a folder has one.")] = 4,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more get status 503.")] = 256,
    timeout: Annotated[int, typer.Option(help="Seconds without a byte that end a connection.")] = 30,
    threads: Annotated[int | None, typer.Option(help="Processor cores to use, by default all.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help=ANYWAY)] = False,
) -> None:
    """Serve a model with OpenAI's interface: a GGUF file through llama.cpp's own server, a folder as a live model."""
    check_server()
    from whit.runtime.serve import Serving, serve  # it needs optional packages

    serving = Serving(host, port, context, tokens, slots, queue, timeout)
    if not serving.local:
        print(f"warning: whoever reaches {host} can use this model; there is no password.", file=sys.stderr)
    try:
        with serve(
            model, serving, threads, anyway, tell=lambda line: print(f"whit: {line}", file=sys.stderr)
        ) as served:
            if not served.has_template:
                print("note: the model has no chat template; /v1/completions is what it is good for.", file=sys.stderr)
            print(f"{served.name} at {served.address}/v1; Ctrl-C ends it", file=sys.stderr, flush=True)
            while (failure := served.failure()) is None:
                time.sleep(0.2)
            raise failure
    except KeyboardInterrupt:
        print("whit: the server has ended.", file=sys.stderr)
