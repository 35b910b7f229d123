"""A GGUF file behind llama.cpp's own HTTP server, which speaks OpenAI's interface."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from whit.errors import RecipeError
from whit.runtime.llama import LlamaRuntime, longest_context


@dataclass(frozen=True)
class Serving:
    """Where to listen and what to allow.

    host, port  an address of this machine; port 0 takes a free one
    context     tokens of prompt and answer together, per request; never more than the model reads
    n_tokens    tokens of an answer whose request names no number; the context is the limit of all
    slots       requests that are worked on at once; others wait. Every slot takes the memory of one context
    timeout     seconds without a byte after which a connection is dropped
    Raises RecipeError for values that make no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    context: int = 4096
    n_tokens: int = 1024
    slots: int = 4
    timeout: int = 30

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise RecipeError(f"There is no port {self.port}; they go from 0 to 65535.")
        for name in ("context", "n_tokens", "slots", "timeout"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name.replace('n_', '')} is {getattr(self, name)}; 1 or more is needed.")

    @property
    def local(self) -> bool:
        """Whether only programs on this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def serve(path: Path, serving: Serving, threads: int | None = None) -> LlamaRuntime:
    """Load a GGUF file and listen; returns when the first request can be answered.

    Closing the runtime ends the server, and running answers with it.
    Raises RecipeError when the port cannot be had, and what LlamaRuntime and its `wait` raise.
    """
    _check_free(serving)
    context = min(serving.context, longest_context(path))
    listen = {
        "host": serving.host,
        "port": serving.port,
        "name": path.stem,
        "slots": serving.slots,
        "n_tokens": serving.n_tokens,
        "timeout": serving.timeout,
    }
    runtime = LlamaRuntime(path, context * serving.slots, threads, listen)
    try:
        runtime.wait()
    except BaseException:
        runtime.close()
        raise
    return runtime


def _check_free(serving: Serving) -> None:
    try:
        family = socket.getaddrinfo(serving.host, serving.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a server that has just ended
            probe.bind((serving.host, serving.port))
    except OSError as error:
        raise RecipeError(
            f"{serving.host}:{serving.port} cannot be listened on ({error.strerror}); choose another --port or --host."
        ) from None
