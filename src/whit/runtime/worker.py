"""The process in which llama.cpp runs: one request in on stdin, events out on stdout, one JSON object per line.

llama.cpp logs to the terminal, starts threads and a server on a local port, and ends its process on some broken
files. In a process of its own none of that touches the user's. It imports nothing heavy: it is there in an instant.

Events: {"text": piece} for every piece of the answer, {"finish": reason} and {"done": timings} at the end, or
{"error": the runtime's object}.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any

Send = Callable[[dict[str, Any]], None]


def answer(request: dict[str, Any], send: Send) -> None:
    """Load the model and stream its answer.

    request  path, prompt, chat (use the file's template), n_ctx, n_tokens, temperature, seed, and
             threads (None: as the runtime thinks best)
    Raises RuntimeError when llama.cpp cannot load the file; its reason is in the log.
    """
    import xllamacpp  # heavy, and optional: the parent has checked that it is installed

    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.n_ctx = request["n_ctx"]
    params.n_parallel = 1
    params.verbosity = 1  # errors only
    params.ui = False
    params.warmup = False
    if request["threads"] is not None:
        params.cpuparams.n_threads = request["threads"]
    params.api_keys = [secrets.token_hex()]  # nobody else may use the port that the runtime insists on opening
    server = xllamacpp.Server(params)
    options = {
        "max_tokens": request["n_tokens"],
        "temperature": request["temperature"],
        "seed": request["seed"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning_format": "none",  # thoughts are part of the text, not hidden from it
    }

    def on_chunk(chunk: dict[str, Any]) -> None:
        for event in events(chunk):
            send(event)

    if request["chat"]:
        messages = [{"role": "user", "content": request["prompt"]}]
        server.handle_chat_completions({"messages": messages, **options}, on_chunk)
    else:
        server.handle_completions({"prompt": request["prompt"], **options}, on_chunk)


def events(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    """What one chunk of the runtime's stream says: completions and chat completions alike."""
    if "error" in chunk:
        return [{"error": chunk["error"]}]
    found: list[dict[str, Any]] = []
    for choice in chunk.get("choices", []):
        text = choice.get("text") or choice.get("delta", {}).get("content")
        if text:
            found.append({"text": text})
        if choice.get("finish_reason"):
            found.append({"finish": choice["finish_reason"]})
    if "timings" in chunk:
        found.append({"done": chunk["timings"]})
    return found


def main() -> None:
    """Serve one request."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the runtime prints belongs to the log

    def send(event: dict[str, Any]) -> None:
        try:
            out.write(json.dumps(event) + "\n")
            out.flush()
        except OSError:
            os._exit(1)  # the reader is gone; an exception raised in a callback would be swallowed by the runtime

    answer(json.load(sys.stdin), send)


if __name__ == "__main__":
    main()
