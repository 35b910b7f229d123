"""A model behind OpenAI's HTTP interface: what is loaded, what stands before it, and how both end.

uvicorn listens, in a thread of its own: signals stay with whoever called, and the same server runs in a test.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from whit.errors import RecipeError, WhitError
from whit.runtime.answer import Runtime
from whit.runtime.choose import is_file, prepare
from whit.runtime.fit import check_fits, free_memory, gguf_needs
from whit.runtime.front import Backend, Front, Limits, front
from whit.runtime.inprocess import InProcess
from whit.runtime.large import refuse_large
from whit.runtime.llama import LlamaRuntime, longest_context
from whit.runtime.proxied import Proxied

GRACE = 1  # seconds that running answers have to end by themselves when the server ends
UNREAD = 2**16  # bytes that wait for a reader; the system's own choice is megabytes, in which a dead one goes unnoticed
TICK = 1  # seconds between looks at connections that say nothing


@dataclass(frozen=True)
class Serving:
    """Where to listen and what to allow.

    host, port  an address of this machine; port 0 takes a free one
    context     tokens of prompt and answer together, per request; never more than the model reads
    n_tokens    tokens of an answer: at most, and where a request names no number
    slots       requests that are worked on at once; others wait. Every slot takes the memory of one context. A folder
                has one, whatever is asked for
    queue       requests that may wait; more are told to try again
    timeout     seconds without a byte after which a connection is dropped
    Raises RecipeError for values that make no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    context: int = 4096
    n_tokens: int = 1024
    slots: int = 4
    queue: int = 256
    timeout: int = 30

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise RecipeError(f"There is no port {self.port}; they go from 0 to 65535.")
        for name in ("context", "n_tokens", "slots", "queue", "timeout"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name.replace('n_', '')} is {getattr(self, name)}; 1 or more is needed.")

    @property
    def local(self) -> bool:
        """Whether only programs on this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Served:
    """A server that listens.

    address  such as http://127.0.0.1:8000
    failure  why the runtime has ended by itself; None while it is there
    """

    name: str
    address: str
    has_template: bool
    failure: Callable[[], WhitError | None]


@dataclass(frozen=True)
class _Loaded:
    """A model and what answers for it."""

    runtime: Runtime
    backend: Backend
    slots: int
    failure: Callable[[], WhitError | None]


@contextmanager
def serve(
    text: str | Path,
    serving: Serving,
    threads: int | None = None,
    anyway: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Served]:
    """Load a model and listen while the context lasts. Running answers have a second to end when it is left.

    text    a GGUF file, or what `open_model` takes
    anyway  load even what does not fit in the memory that is free
    tell    is given a line about every request that failed for no fault of its own
    Raises RecipeError when the port cannot be had, for what does not fit, and for folders that are too large for it;
    what `prepare` and LlamaRuntime's `wait` raise.
    """
    with closing(_bound(serving)) as listener:  # first: loading may take minutes
        load = _file if is_file(text) else _folder
        with load(text, serving, threads, anyway) as loaded:
            limits = Limits(serving.n_tokens, loaded.slots, loaded.slots, serving.queue, serving.timeout)
            with listening(front(loaded.backend, limits, tell), listener, serving.timeout):
                yield Served(loaded.backend.name, _address(listener), loaded.runtime.has_template, loaded.failure)


@contextmanager
def _file(text: str | Path, serving: Serving, threads: int | None, anyway: bool) -> Iterator[_Loaded]:
    """A GGUF file in llama.cpp's server, which nobody but the front can use."""
    path, key = Path(text).expanduser(), secrets.token_hex()
    context = min(serving.context, longest_context(path))
    needs = gguf_needs(path, serving.slots)
    if needs is not None and not anyway:
        check_fits(f"{text} with {serving.slots} slots", needs, context, free_memory())
    listen = {"name": path.stem, "slots": serving.slots, "n_tokens": serving.n_tokens, "key": key}
    with closing(LlamaRuntime(path, context * serving.slots, threads, listen)) as runtime:
        runtime.wait()
        backend = Proxied(runtime, path.stem, key)
        yield _Loaded(runtime, backend, serving.slots, lambda: runtime.failure() if runtime.exited() else None)


@contextmanager
def _folder(text: str | Path, serving: Serving, threads: int | None, anyway: bool) -> Iterator[_Loaded]:
    """Everything else as a live model."""
    from whit.runtime.live import described  # it imports transformers, which takes seconds

    refuse_large(described(text), serving.host, serving.port, serving.context)
    with closing(prepare(text, serving.context, threads, anyway)()) as runtime:
        yield _Loaded(runtime, InProcess(runtime), 1, lambda: None)


@contextmanager
def listening(served: Front, listener: socket.socket, timeout: float) -> Iterator[None]:
    """Answer on a bound socket while the context lasts.

    timeout  seconds after which a connection that has not sent a whole head of a request is dropped
    """
    connections = _Silent(timeout)
    config = uvicorn.Config(
        served.app,
        http="h11",
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        callback_notify=connections.drop,
        timeout_notify=TICK,
    )
    config.load()
    server = uvicorn.Server(config)
    connections.server = server
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start; its log says why")
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join(GRACE)
        served.end()
        thread.join(GRACE)
        for each in list(server.server_state.connections) if thread.is_alive() else ():
            each.loop.call_soon_threadsafe(each.transport.abort)  # it waits for a reader who has stopped reading
        thread.join()


class _Silent:
    """Connections on which no request runs: uvicorn ends those that had one, but not those whose first never comes."""

    def __init__(self, timeout: float) -> None:
        self.server: uvicorn.Server | None = None
        self._timeout = timeout
        self._since: dict[Any, float] = {}

    async def drop(self) -> None:
        """Drop those that have been silent for too long."""
        now = asyncio.get_running_loop().time()
        connections = self.server.server_state.connections if self.server else set()
        silent = {each for each in connections if _silent(each)}
        self._since = {each: self._since.get(each, now) for each in silent}
        for each in silent:
            if now - self._since[each] > self._timeout:
                each.transport.abort()  # close() would wait for a reader who has stopped reading


def _silent(connection: Any) -> bool:
    cycle = connection.cycle
    return cycle is None or cycle.response_complete or connection.transport.is_closing()


def _bound(serving: Serving) -> socket.socket:
    """A socket that has the port, and does not listen yet: until the model is loaded, connections are refused."""
    try:
        family = socket.getaddrinfo(serving.host, serving.port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a server that has just ended
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)  # of every connection
            bound.bind((serving.host, serving.port))
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise RecipeError(
            f"{serving.host}:{serving.port} cannot be listened on ({error.strerror}); choose another --port or --host."
        ) from None
    return bound


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
