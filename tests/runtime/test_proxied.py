import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest

from whit.runtime.llama import LlamaRuntime
from whit.runtime.openai import Asked, Refused
from whit.runtime.proxied import Proxied


class OnceEach(BaseHTTPRequestHandler):
    """Offers to keep a connection open, and closes it as soon as a second request comes over it."""

    protocol_version = "HTTP/1.1"
    used = False

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.used:
            self.close_connection = True
            return
        self.used = True
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None:
        pass


class Failing(BaseHTTPRequestHandler):
    """Answers with status 500 and what the request holds."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"].encode()
        self.send_response(500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_no_request_waits_on_a_connection_that_llama_cpp_may_close() -> None:
    async def answers(address: str) -> list[bytes]:
        runtime: Any = SimpleNamespace(wait=lambda: address, exited=lambda: False)
        request: Any = SimpleNamespace(chat=False, body={"prompt": "a"})
        found = []
        async with Proxied(cast(LlamaRuntime, runtime), "model", "key") as backend:
            for _ in range(3):
                async with backend.answer(cast(Asked, request)) as reply:
                    found.append(b"".join([each async for each in reply.pieces]))
        return found

    with listening(OnceEach) as address:
        assert asyncio.run(answers(address)) == [b"{}"] * 3


@pytest.mark.parametrize(
    ("said", "dead", "status"),
    [
        ('{"error": {"code": 500, "message": "no images", "type": "server_error"}}', False, 400),
        ('{"error": {"code": 500, "message": "no images", "type": "server_error"}}', True, 500),
        ('{"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}', False, 500),
        ("no images", False, 500),
    ],
)
def test_what_llama_cpp_says_of_a_request_is_the_request_s_mistake(said: str, dead: bool, status: int) -> None:
    async def refusal(address: str) -> Refused:
        runtime: Any = SimpleNamespace(wait=lambda: address, exited=lambda: dead)
        request: Any = SimpleNamespace(chat=False, body={"prompt": said})
        async with Proxied(cast(LlamaRuntime, runtime), "model", "key") as backend:
            with pytest.raises(Refused, match="no images|Compute error") as caught:
                async with backend.answer(cast(Asked, request)):
                    pass
        return caught.value

    with listening(Failing) as address:
        assert asyncio.run(refusal(address)).status == status
