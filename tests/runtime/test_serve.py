"""llama.cpp's server as `serve` sets it up, asked over HTTP."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from whit.errors import RecipeError
from whit.models.builtin import packaged_smollm2
from whit.runtime.serve import Serving, serve


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    runtime = serve(packaged_smollm2(), Serving(port=0, context=256, n_tokens=8, slots=2), threads=1)
    yield runtime.wait()
    runtime.close()


def ask(url: str, body: bytes | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.real_model
def test_answers_have_the_usual_length_or_what_is_asked_for_within_the_context(address: str) -> None:
    def usage(**more: int) -> dict[str, int]:
        body = {"prompt": "The capital of France is", "temperature": 0, "ignore_eos": True, **more}
        status, text = ask(f"{address}/v1/completions", json.dumps(body).encode())
        assert status == 200
        return json.loads(text)["usage"]

    assert usage()["completion_tokens"] == 8
    assert usage(max_tokens=3)["completion_tokens"] == 3
    assert 200 < usage(max_tokens=5000)["total_tokens"] <= 256


@pytest.mark.real_model
def test_mistakes_get_their_status_and_the_server_goes_on(address: str) -> None:
    assert ask(f"{address}/v1/completions", b"{bad")[0] == 400
    assert ask(f"{address}/v1/completions", json.dumps({"prompt": "hello " * 999}).encode())[0] == 400
    assert ask(f"{address}/v1/nothing")[0] == 404
    assert ask(f"{address}/health")[0] == 200
    assert "llamacpp:requests_processing" in ask(f"{address}/metrics")[1]
    assert packaged_smollm2().stem in ask(f"{address}/v1/models")[1]


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RecipeError, match="choose another --port"):
            serve(packaged_smollm2(), Serving(port=taken.getsockname()[1]))


@pytest.mark.parametrize("option", [{"port": 70000}, {"slots": 0}, {"context": 0}])
def test_impossible_values_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(RecipeError):
        Serving(**option)


def test_only_loopback_addresses_are_local() -> None:
    assert Serving().local
    assert Serving("::1").local
    assert not Serving("0.0.0.0").local
