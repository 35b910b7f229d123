"""The HTTP application that stands before a model: OpenAI's paths, limits, a queue, health and figures.

One front serves every runtime, so that limits, errors and figures are the same for all. The simpler way, to let
llama.cpp's server face the network itself, leaves answers and bodies of any length to whoever asks, and 16 half-sent
requests take all its threads; here a connection that waits takes none. What an answer says and how it is written is the
backend's: llama.cpp's server keeps all that it can do (tools, grammars, log-probabilities).

A request is read and checked, waits for a free slot, is answered, and is forgotten as soon as whoever asked goes away.
Left out: passwords and TLS, which are a reverse proxy's; batches, embeddings, files.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from whit.runtime.openai import Asked, Refused, asked, event, model_card

MOST_BYTES = 4 * 2**20  # of a body: a text of a million tokens
DRAINED = 64 * MOST_BYTES  # of a body that is too long: so much is thrown away before the sender hears so
RETRY_SECONDS = "1"
GONE = 499  # nginx' number for a client that has left; it stands in the figures alone
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


@dataclass(frozen=True)
class Limits:
    """What a front allows.

    n_tokens   tokens of an answer
    n_answers  answers that one request may ask for
    slots      requests that are worked on at once
    queue      requests that may wait for one
    timeout    seconds without a byte after which a connection is dropped
    """

    n_tokens: int
    n_answers: int
    slots: int
    queue: int
    timeout: float


@dataclass(frozen=True)
class Reply:
    """An answer that has begun: JSON in one piece, or server-sent events."""

    media_type: str
    pieces: AsyncIterator[bytes]


class Backend(Protocol):
    """What answers. It is entered in the loop that it works in.

    name     of the model
    created  seconds since 1970
    """

    name: str
    created: int

    async def __aenter__(self) -> Backend: ...
    async def __aexit__(self, *error: object) -> None: ...

    def answer(self, request: Asked) -> AbstractAsyncContextManager[Reply]:
        """Begin an answer; leaving the context ends the work on it. Raises Refused."""
        ...

    async def figures(self) -> bytes:
        """The runtime's own, in Prometheus' text format; empty for none."""
        ...

    def dead(self) -> bool:
        """Whether nothing will be answered any more."""
        ...


@dataclass(frozen=True)
class Front:
    """The application, and what cuts its running answers off, from any thread, so that it can be left."""

    app: Starlette
    end: Callable[[], None]


def front(backend: Backend, limits: Limits, tell: Callable[[str], None]) -> Front:
    """The application.

    tell  is given a line about every request that failed for no fault of its own
    """
    figures, gate = _Figures(), _Gate(limits)

    async def read(request: Request, chat: bool) -> ASGIApp:
        if "origin" in request.headers:  # browsers send it with what web pages ask, other programs do not
            raise Refused(403, "Web pages may not use this server.", "forbidden")
        raw = await _body(request, limits.timeout)
        return _Answer(asked(raw, chat, limits.n_tokens, limits.n_answers), backend, gate, figures, limits, tell)

    async def complete(request: Request) -> ASGIApp:
        return await read(request, chat=False)

    async def chat(request: Request) -> ASGIApp:
        return await read(request, chat=True)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(backend.name, backend.created)]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != backend.name:
            raise Refused(404, f"There is no such model here; {backend.name} is.", "model_not_found")
        return JSONResponse(model_card(backend.name, backend.created))

    async def health(request: Request) -> Response:
        dead = backend.dead()
        return JSONResponse({"status": "the runtime has ended" if dead else "ok"}, 503 if dead else 200)

    async def metrics(request: Request) -> Response:
        figures.running.set(gate.running)
        figures.waiting.set(gate.waiting)
        ours = generate_latest(figures.registry)
        return Response(ours + await backend.figures(), media_type=CONTENT_TYPE_LATEST)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return figures.refusal(error)

    async def lost(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = figures.refusal(_lost(request, error, [route.path for route in routes if "{" not in route.path]))
        response.headers.update(error.headers or {})
        return response

    @asynccontextmanager
    async def entered(app: Starlette) -> AsyncIterator[None]:
        gate.loop = asyncio.get_running_loop()
        async with backend:
            yield

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    handlers = {Refused: refused, HTTPException: lost}
    return Front(Starlette(routes=routes, exception_handlers=handlers, lifespan=entered), gate.end)


def _lost(request: Request, error: HTTPException, known: Sequence[str]) -> Refused:
    path, status = request.url.path, error.status_code
    if status == 404:
        return Refused(status, f"There is no {path} here; {', '.join(known)} are.", "not_found")
    allowed = (error.headers or {}).get("Allow", "another method")
    return Refused(status, f"{path} takes no {request.method}, but {allowed}.", "method_not_allowed")


async def _body(request: Request, timeout: float) -> bytes:
    """A body. Raises Refused when it is too long (413), does not come (408), or its sender leaves (499)."""
    pieces: list[bytes] = []
    n, stream = 0, request.stream()
    try:
        while True:
            async with asyncio.timeout(timeout):
                piece = await anext(stream, None)
            if piece is None:
                break
            n += len(piece)
            if n <= MOST_BYTES:
                pieces.append(piece)
            elif n > DRAINED:
                break
    except TimeoutError:
        raise Refused(408, f"The request did not arrive: {timeout:g} seconds without a byte.", "timeout") from None
    except ClientDisconnect:
        raise Refused(GONE, "The client left before its request had arrived.", "gone") from None
    if n > MOST_BYTES:
        raise Refused(413, f"The body is longer than {MOST_BYTES:,} bytes; shorten the prompt.", "too_long")
    return b"".join(pieces)


class _Gate:
    """So many at once, so many waiting, first come, first served; until the end."""

    def __init__(self, limits: Limits) -> None:
        self.running = self.waiting = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.ending = asyncio.Event()
        self._most_waiting, self._free = limits.queue, asyncio.Semaphore(limits.slots)

    def end(self) -> None:
        """Everything that runs or waits is cut off."""
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            if self.loop is not None:
                self.loop.call_soon_threadsafe(self.ending.set)

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """A slot. Raises Refused (503) when too many wait already."""
        if self._free.locked() and self.waiting >= self._most_waiting:
            raise Refused(503, f"{self.waiting} requests wait already; try again later.", "overloaded")
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()


class _Figures:
    """Counters of one front, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        mine = self.registry
        self.requests = Counter(
            "whit_requests", "Requests for answers, by what became of them", ["status"], registry=mine
        )
        self.running = Gauge("whit_requests_running", "Requests that are worked on", registry=mine)
        self.waiting = Gauge("whit_requests_waiting", "Requests that wait for a slot", registry=mine)
        self.first = Histogram(
            "whit_first_byte_seconds", "From a request to the first byte of its answer", buckets=_SECONDS, registry=mine
        )
        self.all = Histogram(
            "whit_answer_seconds", "From a request to its whole answer", buckets=_SECONDS, registry=mine
        )

    def refusal(self, error: Refused) -> Response:
        """An error as a response, counted."""
        self.requests.labels(error.status).inc()
        return _error(error)


def _error(error: Refused) -> Response:
    headers = {"Retry-After": RETRY_SECONDS} if error.status == 503 else {}
    return JSONResponse(error.body(), error.status, headers)


@dataclass
class _Answer:
    """The response to one request, as an ASGI application.

    counted  whether it stands in the figures: once, also when its client leaves with the last byte
    """

    request: Asked
    backend: Backend
    gate: _Gate
    figures: _Figures
    limits: Limits
    tell: Callable[[str], None]
    counted: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until whoever asked goes away or the server ends."""
        working = self._respond(scope, receive, send)
        if not await _until(_until(working, self.gate.ending.wait()), _gone(receive)):
            self._count(GONE)

    def _count(self, status: int) -> None:
        if not self.counted:
            self.counted = True
            self.figures.requests.labels(status).inc()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, asked_at = False, time.monotonic()

        async def fail(refused: Refused) -> None:
            self._count(refused.status)
            if not begun:
                await _error(refused)(scope, receive, send)
            else:  # the status is on its way; streams say so at their end
                await send({"type": "http.response.body", "body": event(refused.body())})

        try:
            async with self.gate.entered(), self.backend.answer(self.request) as reply:
                async for piece in reply.pieces:
                    if not begun:
                        begun = True
                        self.figures.first.observe(time.monotonic() - asked_at)
                        await send(_start(reply.media_type))
                    async with asyncio.timeout(self.limits.timeout):  # a reader who has stopped reading
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
            self.figures.all.observe(time.monotonic() - asked_at)
            self._count(200)
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            self._count(GONE)
        except asyncio.CancelledError:
            if self.gate.ending.is_set():
                await fail(Refused(503, "The server has ended.", "ended"))
            raise
        except Refused as refused:
            await fail(refused)
        except Exception as error:
            self.tell(f"a request failed: {type(error).__name__}: {error}")
            await fail(Refused(500, "The runtime failed.", "internal_error"))


def _start(media_type: str) -> Message:
    headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until(work: Coroutine[Any, Any, Any], end: Coroutine[Any, Any, Any]) -> bool:
    """Whether the work was done before the end; otherwise it is cancelled. Raises what it raises."""
    doing, ending = asyncio.ensure_future(work), asyncio.ensure_future(end)
    try:
        await asyncio.wait({doing, ending}, return_when=asyncio.FIRST_COMPLETED)
        done = doing.done()
    finally:
        doing.cancel()
        ending.cancel()
        results = await asyncio.gather(doing, ending, return_exceptions=True)
    if done and isinstance(results[0], Exception):
        raise results[0]
    return done
