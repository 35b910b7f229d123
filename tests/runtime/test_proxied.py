import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest

from whit.runtime.llama import LlamaRuntime
from whit.runtime.openai import Asked
from whit.runtime.proxied import Proxied, _refused


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


@contextmanager
def listening() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OnceEach) as server:
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

    with listening() as address:
        assert asyncio.run(answers(address)) == [b"{}"] * 3


@pytest.mark.parametrize(
    ("message", "ended", "status"),
    [("image input is not supported", False, 400), ("Compute error.", False, 500), ("anything", True, 500)],
)
def test_a_request_s_own_mistake_is_no_error_of_the_server(message: str, ended: bool, status: int) -> None:
    error = {"code": 500, "type": "server_error", "message": message}
    refused = _refused(500, error, ended)
    assert refused.status == status
    assert message in refused.message
