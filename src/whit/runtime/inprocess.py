"""A runtime in this process behind the front: one thread computes, one request after the other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path

from whit.errors import ModelError, RecipeError, TooLongError
from whit.runtime.answer import Runtime, Timings
from whit.runtime.front import Reply
from whit.runtime.openai import Asked, Refused, Shape, prompt_of, settings_of, wants_usage


class InProcess:
    """See Backend. The worker never waits for a reader: what is not read yet waits in memory, an answer at most."""

    def __init__(self, runtime: Runtime, name: str | None = None) -> None:
        self.name, self.created = name or Path(runtime.label).name, int(time.time())
        self._runtime = runtime
        self._ending = threading.Event()
        self._prompt_tokens = self._answer_tokens = 0

    async def __aenter__(self) -> InProcess:
        self._worker = ThreadPoolExecutor(1, "answers")
        return self

    async def __aexit__(self, *error: object) -> None:
        self._ending.set()
        await asyncio.to_thread(self._worker.shutdown)

    @asynccontextmanager
    async def answer(self, request: Asked) -> AsyncIterator[Reply]:
        """Begin an answer; leaving the context ends it after its next token. Raises Refused."""
        work = _Work(self._runtime, request, self._ending)
        running = asyncio.get_running_loop().run_in_executor(self._worker, work.run)
        try:
            shape = Shape.of(request, self.name, int(time.time()))
            first = await work.next()  # what is wrong with a request shows before anything of an answer is sent
            while first == "":
                first = await work.next()
            reply = self._stream if request.stream else self._whole
            media = "text/event-stream; charset=utf-8" if request.stream else "application/json"
            yield Reply(media, reply(work, shape, first))
        finally:
            work.stopped.set()
            await asyncio.shield(running)

    async def figures(self) -> bytes:
        """Tokens read and written."""
        counts = {"prompt_tokens": self._prompt_tokens, "answer_tokens": self._answer_tokens}
        return "".join(f"# TYPE whit_{name} counter\nwhit_{name}_total {n}\n" for name, n in counts.items()).encode()

    def dead(self) -> bool:
        """It ends with this process alone."""
        return False

    async def _stream(self, work: _Work, shape: Shape, first: str | Timings) -> AsyncIterator[bytes]:
        for each in shape.start():
            yield each
        said = first
        while isinstance(said, str):
            for each in shape.pieces(said):
                yield each
            said = await work.next()
        self._count(said)
        for each in shape.end(said, wants_usage(work.request)):
            yield each

    async def _whole(self, work: _Work, shape: Shape, first: str | Timings) -> AsyncIterator[bytes]:
        pieces, said = [], first
        while isinstance(said, str):
            pieces.append(said)
            said = await work.next()
        self._count(said)
        yield shape.whole("".join(pieces), said)

    def _count(self, took: Timings) -> None:
        self._prompt_tokens += took.prompt_tokens
        self._answer_tokens += took.tokens


class _Work:
    """One answer, computed in the worker's thread and read in the loop's."""

    def __init__(self, runtime: Runtime, request: Asked, ending: threading.Event) -> None:
        self.request, self.stopped = request, threading.Event()
        self._runtime, self._ending = runtime, ending
        self._settings, self._prompt = settings_of(request), prompt_of(request)
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Queue[str | Timings | Exception] = asyncio.Queue()

    def run(self) -> None:
        """Compute, in the worker; every outcome goes to the reader."""
        try:
            with closing(self._runtime.answer(self._prompt, self._settings)) as answer:
                for piece in answer:
                    if self.stopped.is_set() or self._ending.is_set():
                        return
                    self._tell(piece)
                self._tell(answer.timings)
        except Exception as error:
            self._tell(error)

    async def next(self) -> str | Timings:
        """A piece, or what the answer took when it is complete. Raises Refused, or what the runtime raised."""
        said = await self._said.get()
        if isinstance(said, RecipeError | ModelError):
            too_long = isinstance(said, TooLongError)
            raise Refused(400, str(said), "context_length_exceeded" if too_long else "invalid_request")
        if isinstance(said, Exception):
            raise said
        return said

    def _tell(self, said: str | Timings | Exception) -> None:
        self._loop.call_soon_threadsafe(self._said.put_nowait, said)
