"""llama.cpp's own server behind the front: checked requests go in, its answers come out as they are."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from whit.runtime.front import Reply
from whit.runtime.llama import LlamaRuntime
from whit.runtime.openai import Asked, Refused

ENDED = "llama.cpp's process has ended; start the server again."
COMPUTING = "Compute error"  # how its own failures begin
EVENTS = "text/event-stream"


class Proxied:
    """See Backend.

    runtime  loaded, with a server that listens
    key      the password of that server, so that nobody goes past the front
    """

    def __init__(self, runtime: LlamaRuntime, name: str, key: str) -> None:
        self.name, self.created = name, int(time.time())
        self._runtime, self._key = runtime, key

    async def __aenter__(self) -> Proxied:
        # Reading a long prompt takes as long as it takes. The front limits how many there are at once.
        # A connection for each request: llama.cpp closes idle ones after some seconds or a hundred requests, and a
        # request sent at that moment is lost; while they are open each keeps one of its threads.
        self._client = httpx2.AsyncClient(
            base_url=self._runtime.wait(),
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=None,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def answer(self, request: Asked) -> AsyncIterator[Reply]:
        """Begin an answer; closing the connection makes llama.cpp stop. Raises Refused with llama.cpp's words."""
        path = "/v1/chat/completions" if request.chat else "/v1/completions"
        try:
            async with self._client.stream("POST", path, json=dict(request.body)) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refused(response.status_code, _error(response), self.dead())
                yield Reply(response.headers.get("content-type", "application/json"), response.aiter_raw())
        except httpx2.TransportError as error:
            raise Refused(502, ENDED if self.dead() else f"llama.cpp did not answer: {error}", "runtime") from None

    async def figures(self) -> bytes:
        """llama.cpp's."""
        try:
            return (await self._client.get("/metrics")).content
        except httpx2.TransportError:
            return b""  # /health says that it has ended

    def dead(self) -> bool:
        """Whether llama.cpp's process has ended."""
        return self._runtime.exited()


def _error(response: httpx2.Response) -> dict[str, Any]:
    try:
        found = response.json()["error"]
        return found if isinstance(found, dict) else {"message": str(found)}
    except (ValueError, KeyError, TypeError):
        return {"message": response.text[:500]}


def _refused(status: int, error: dict[str, Any], dead: bool) -> Refused:
    if error.get("type") == "exceed_context_size_error":
        return too_long(int(error["n_prompt_tokens"]), int(error["n_ctx"]))
    # It calls many of a request's own mistakes (an image, a chat template that refuses) an error of the server, and
    # clients send those again and again. An error with a type is its verdict on a request, as long as it lives.
    message = str(error.get("message", "no reason given"))
    if status == 500 and "type" in error and not dead and not message.startswith(COMPUTING):
        status = 400
    return Refused(status, f"llama.cpp refuses the request: {message}")


def too_long(n_tokens: int, n_ctx: int) -> Refused:
    """For a prompt of more tokens than there is context."""
    return Refused(
        400,
        f"The prompt has {n_tokens} tokens, the context holds {n_ctx}; shorten it.",
        "context_length_exceeded",
    )
