"""The process in which llama.cpp runs: requests in on stdin, events out on stdout, one JSON object per line.

llama.cpp logs to the terminal, starts threads and a server on a local port, and ends its process on some broken
files. In a process of its own none of that touches the user's. It imports nothing heavy: it is there in an instant.

The first line says what to load and where to listen; {"ready": address} answers it. Every other line is a request, or
{"cancel": true} for the one that runs. Its events: {"text": piece} for every piece of the answer, {"finish": reason},
{"done": timings} or {"error": the runtime's object}, and {"end": true} in any case. The process ends with its stdin.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

Send = Callable[[dict[str, Any]], None]


def load(setup: dict[str, Any]) -> Any:
    """llama.cpp's server with a model.

    setup  path, n_ctx (tokens, of all slots together), threads (None: as the runtime thinks best), and to answer over
           HTTP: listen = {name, slots, n_tokens (where a request names no number), key (a password)}
    Raises RuntimeError when llama.cpp cannot load the file; its reason is in the log.
    """
    import xllamacpp  # heavy, and optional: the parent has checked that it is installed

    params = xllamacpp.CommonParams()
    params.model.path = setup["path"]
    params.n_ctx = setup["n_ctx"]
    params.n_parallel = 1
    params.verbosity = 1  # errors only
    params.ui = False
    params.warmup = False
    params.endpoint_slots = False  # they show what others ask
    params.cors_origins = ""  # no web page may use it
    if setup["threads"] is not None:
        params.cpuparams.n_threads = setup["threads"]
    listen = setup.get("listen")
    if listen is None:
        params.api_keys = [secrets.token_hex()]  # nobody else may use the port that the runtime insists on opening
    else:
        params.api_keys = [listen["key"]]
        params.model_alias = {listen["name"]}
        params.n_parallel, params.n_predict = listen["slots"], listen["n_tokens"]
        params.endpoint_metrics = True
    return xllamacpp.Server(params)


def answer(server: Any, request: dict[str, Any], send: Send, stopped: Callable[[], bool]) -> None:
    """Stream one answer.

    request  messages or prompt, n_tokens, temperature, seed, top_p, stop
    """
    options = {
        "max_tokens": request["n_tokens"],
        "temperature": request["temperature"],
        "seed": request["seed"],
        "top_p": request["top_p"],
        "stop": request["stop"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning_format": "none",  # thoughts are part of the text, not hidden from it
    }

    def on_chunk(chunk: dict[str, Any]) -> bool:
        for event in events(chunk):
            send(event)
        return stopped()

    if "messages" in request:
        server.handle_chat_completions({"messages": request["messages"], **options}, on_chunk)
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


def serve(lines: Iterable[str], send: Send) -> None:
    """Load, then answer what is asked until the lines end or the process does."""
    incoming = iter(lines)
    server = load(json.loads(next(incoming)))
    send({"ready": server.listening_address})
    asked: queue.Queue[dict[str, Any] | None] = queue.Queue()
    stop = threading.Event()

    def read() -> None:
        for line in incoming:
            request = json.loads(line)
            if "cancel" in request:
                stop.set()
            else:
                asked.put(request)
        stop.set()
        asked.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (request := asked.get()) is not None:
        answer(server, request, send, stop.is_set)
        stop.clear()
        send({"end": True})
    os._exit(0)  # the runtime would first wait for those who still listen


def main() -> None:
    """Serve whoever has started this process."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the runtime prints belongs to the log

    def send(event: dict[str, Any]) -> None:
        try:
            out.write(json.dumps(event) + "\n")
            out.flush()
        except OSError:
            os._exit(1)  # the reader is gone; an exception raised in a callback would be swallowed by the runtime

    serve(sys.stdin, send)


if __name__ == "__main__":
    main()
