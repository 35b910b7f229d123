"""The server, asked over HTTP by OpenAI's own client and by clients that behave badly: a file and a folder alike."""

import asyncio
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import psutil
import pytest

from walker import CONTEXT, HEAD, LAST, Walker, posted
from whit.errors import RecipeError
from whit.runtime.serve import Served, Serving, serve

KINDS = ("file", "folder")
LONGEST = 120_000  # tokens of an answer: minutes of work, so that no test comes too late to see it done


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    return Walker(tmp_path_factory.mktemp("walker"))


@pytest.fixture(scope="module", params=KINDS)
def server(walker: Walker, request: pytest.FixtureRequest) -> Iterator[Served]:
    """Patient: on a busy machine a client of good will may be silent for seconds."""
    yield from served_to_the_end(getattr(walker, request.param), timeout=60)


@pytest.fixture(scope="module", params=KINDS)
def impatient(walker: Walker, request: pytest.FixtureRequest) -> Iterator[Served]:
    yield from served_to_the_end(getattr(walker, request.param), timeout=1)


def served_to_the_end(model: Path, timeout: int) -> Iterator[Served]:
    lines: list[str] = []
    serving = Serving(port=0, context=CONTEXT, n_tokens=LONGEST, slots=4, queue=256, timeout=timeout)
    with serve(model, serving, threads=1, anyway=True, tell=lines.append) as served:
        yield served
        assert served.failure() is None
    assert lines == []  # nothing failed for a fault of the server's


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def figure(server: Served, name: str) -> float:
    text = ask(f"{server.address}/metrics")[1]
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.rsplit(" ", 1)[0] == name)


def eventually(true: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def still_serves(server: Served, walker: Walker) -> bool:
    body = {"prompt": f"say{walker.words[3]}", "max_tokens": 4, "temperature": 0}
    status, text = ask(f"{server.address}/v1/completions", json.dumps(body).encode())
    return status == 200 and json.loads(text)["choices"][0]["text"] == walker.says(walker.words[3], 4)


def connected(server: Served, *, small: bool = False) -> socket.socket:
    port = int(server.address.rsplit(":", 1)[1])
    found = socket.socket()
    if small:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    found.settimeout(60)
    found.connect(("127.0.0.1", port))
    return found


# ---- OpenAI's client -------------------------------------------------------------------------------------------


def test_the_model_is_listed(client: openai.OpenAI, server: Served) -> None:
    assert [each.id for each in client.models.list()] == [server.name] == ["walker"]
    assert client.models.retrieve("walker").object == "model"
    with pytest.raises(openai.NotFoundError, match="walker is"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_the_model_s(client: openai.OpenAI, walker: Walker) -> None:
    for word in walker.words[:3]:
        reply = client.completions.create(model="walker", prompt=f"say{word}", max_tokens=5, temperature=0)
        assert reply.choices[0].text == walker.says(word, 5)
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 5
        assert reply.usage.prompt_tokens == len(walker.tokenizer.encode(f"say{word}"))


def test_a_chat_completion_goes_through_the_template(client: openai.OpenAI, walker: Walker) -> None:
    word = walker.words[5]
    parts = [{"type": "text", "text": "say"}, {"type": "text", "text": word}]
    for content in (f"say{word}", parts):
        messages = [{"role": "system", "content": "so"}, {"role": "user", "content": content}]
        reply = client.chat.completions.create(model="walker", messages=messages, max_tokens=5, temperature=0)
        assert reply.choices[0].message.content == walker.says(word, 5)
        assert reply.choices[0].message.role == "assistant"


def test_the_model_may_end_an_answer(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="walker", prompt=LAST, max_tokens=50, temperature=0)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].text == ""


def test_a_stream_comes_in_pieces_with_its_usage(client: openai.OpenAI, walker: Walker) -> None:
    word = walker.words[7]
    stream = client.chat.completions.create(
        model="walker",
        messages=[{"role": "user", "content": f"say{word}"}],
        max_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [each.choices[0].delta.content for each in chunks if each.choices and each.choices[0].delta.content]
    assert len(pieces) == 9
    assert "".join(pieces) == walker.says(word, 9)
    assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert len({each.id for each in chunks}) == 1


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI, walker: Walker) -> None:
    word = walker.words[0]
    said = walker.says(word, 8)
    stop = said[9:13]  # wherever tokens begin and end
    for stream in (False, True):
        reply = client.completions.create(
            model="walker", prompt=f"say{word}", max_tokens=8, temperature=0, stop=[stop, "never"], stream=stream
        )
        text = "".join(each.choices[0].text for each in reply if each.choices) if stream else reply.choices[0].text
        assert text == said[: said.index(stop)]


def test_equal_seeds_draw_equal_answers(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> str:
        reply = client.completions.create(model="walker", prompt="a", max_tokens=12, temperature=30, seed=seed)
        return reply.choices[0].text

    assert drawn(1) == drawn(1) != drawn(2)


def test_200_streams_at_once_get_each_their_own_answer(server: Served, walker: Walker) -> None:
    asked = [(walker.words[i % len(walker.words)], 5 + i // len(walker.words)) for i in range(200)]
    expected = [walker.says(*each) for each in asked]
    assert len(set(expected)) == 200

    async def answer(client: openai.AsyncOpenAI, word: str, n: int, chat: bool) -> str:
        if chat:
            stream = await client.chat.completions.create(
                model="walker",
                messages=[{"role": "user", "content": f"say{word}"}],
                max_tokens=n,
                temperature=0,
                stream=True,
            )
            return "".join([each.choices[0].delta.content or "" async for each in stream if each.choices])
        texts = await client.completions.create(
            model="walker", prompt=f"say{word}", max_tokens=n, temperature=0, stream=True
        )
        return "".join([each.choices[0].text async for each in texts if each.choices])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=100
        ) as client:
            return await asyncio.gather(*(answer(client, *each, i % 2 == 0) for i, each in enumerate(asked)))

    assert asyncio.run(all_at_once()) == expected


# ---- limits and mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"max_tokens": 10**9}, {"n_predict": -1}, {"max_completion_tokens": 5000}])
def test_no_answer_is_longer_than_allowed(walker: Walker, more: dict[str, int], short: Served) -> None:
    body = {"prompt": f"say{walker.words[0]}", "temperature": 0, **more}
    status, text = ask(f"{short.address}/v1/completions", json.dumps(body).encode())
    assert status == 200
    assert json.loads(text)["usage"]["completion_tokens"] == 8


@pytest.fixture(scope="module", params=KINDS)
def short(walker: Walker, request: pytest.FixtureRequest) -> Iterator[Served]:
    serving = Serving(port=0, context=256, n_tokens=8, slots=1, queue=1, timeout=30)
    with serve(getattr(walker, request.param), serving, threads=1, anyway=True) as served:
        yield served


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(short: Served, walker: Walker) -> None:
    url, prompt = f"{short.address}/v1", "say" + walker.words[0] * 600
    n = len(walker.tokenizer.encode(prompt))
    with (
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match=f"prompt has {n} tokens, the context holds 256") as caught,
    ):
        client.completions.create(model="walker", prompt=prompt, stream=True)
    assert caught.value.code == "context_length_exceeded"


IMAGE = b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,a"}}]}]}'
MISTAKES: list[tuple[str, bytes | None, int, str]] = [
    ("/v1/completions", b"{bad", 400, "not JSON"),
    ("/v1/completions", b"\xff\xfe", 400, "not JSON"),
    ("/v1/completions", b"[" * 100_000, 400, "not JSON"),
    ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "not JSON"),
    ("/v1/completions", b'{"prompt": "a", "temperature": 1e400}', 400, "not JSON"),
    ("/v1/completions", b"[]", 400, "not a JSON object"),
    ("/v1/completions", b"{}", 400, "prompt is missing"),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": "x"}', 400, "a whole number"),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": 0}', 400, "ask for 1 or more"),
    ("/v1/completions", b'{"prompt": "a", "temperature": "x"}', 400, "temperature"),
    ("/v1/completions", b'{"prompt": "a", "temperature": -3}', 400, "makes no sense"),
    ("/v1/completions", b'{"prompt": "a", "stop": 5}', 400, "stop is a text"),
    ("/v1/completions", b'{"prompt": "a", "n": 100}', 400, "100 answers at once"),
    ("/v1/chat/completions", b'{"messages": []}', 400, "messages is missing"),
    ("/v1/chat/completions", b'{"messages": [{"content": "a"}]}', 400, "has no role"),
    ("/v1/chat/completions", IMAGE, 400, "image input is not supported|reads text alone"),
    ("/v1/completions", b'{"prompt": "' + b"a" * 5_000_000 + b'"}', 413, "longer than 4,194,304 bytes"),
    ("/v1/completions", None, 405, "takes no GET, but POST"),
    ("/v1/nothing", None, 404, "no /v1/nothing here"),
    ("/../../etc/passwd", None, 404, "here"),
]


def test_mistakes_get_their_status_and_a_sentence_and_the_server_goes_on(server: Served, walker: Walker) -> None:
    for path, body, status, sentence in MISTAKES:
        found, text = ask(server.address + path, body)
        said = json.loads(text)["error"]["message"]
        assert (found, any(each in said for each in sentence.split("|"))) == (status, True), (path, body, text)
    assert still_serves(server, walker)


def test_web_pages_are_refused(server: Served) -> None:
    assert ask(f"{server.address}/v1/completions", b'{"prompt": "a"}', Origin="http://elsewhere")[0] == 403


def test_health_and_figures(server: Served, walker: Walker) -> None:
    assert ask(f"{server.address}/health") == (200, '{"status":"ok"}')
    before = figure(server, 'whit_requests_total{status="200"}')
    assert still_serves(server, walker)
    assert figure(server, 'whit_requests_total{status="200"}') == before + 1
    text = ask(f"{server.address}/metrics")[1]
    assert "llamacpp:tokens_predicted_total" in text or "whit_answer_tokens_total" in text
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


def test_an_answer_is_counted_once_also_when_its_reader_leaves_with_the_last_byte(
    server: Served, walker: Walker
) -> None:
    def counted() -> list[float]:
        return [figure(server, f'whit_requests_total{{status="{status}"}}') for status in (200, 499)]

    whole, left = counted()
    for _ in range(30):
        assert still_serves(server, walker)  # whose connection is closed by then
    assert eventually(lambda: figure(server, "whit_requests_running") == 0)
    time.sleep(0.1)  # for what would be counted late
    assert counted() == [whole + 30, left]


def test_what_is_too_much_is_told_to_come_back(short: Served, walker: Walker) -> None:
    """One slot, one that waits, and all others."""
    body = posted({"prompt": f"say{walker.words[0]}", "temperature": 0})
    sockets = [connected(short) for _ in range(12)]
    for each in sockets:
        each.sendall(body)
    replies = [each.recv(1 << 16) for each in sockets]
    for each in sockets:
        each.close()
    statuses = [int(reply.split()[1]) for reply in replies]
    assert set(statuses) == {200, 503}
    refused = replies[statuses.index(503)]
    assert b"retry-after: 1" in refused.lower()
    assert b"try again later" in refused
    assert still_serves(short, walker)


# ---- clients that are slow, or leave ---------------------------------------------------------------------------


def test_a_half_sent_request_ends(impatient: Served, walker: Walker) -> None:
    body, head = connected(impatient), connected(impatient)
    with body, head:
        body.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        head.sendall(HEAD)
        assert still_serves(impatient, walker)
        assert body.recv(4096).split()[1] == b"408"
        assert head.recv(4096) == b""


def test_a_client_who_leaves_before_all_is_sent_is_no_error(
    server: Served, walker: Walker, caplog: pytest.LogCaptureFixture
) -> None:
    left = figure(server, 'whit_requests_total{status="499"}')
    with connected(server) as leaving:
        leaving.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    assert eventually(lambda: figure(server, 'whit_requests_total{status="499"}') == left + 1)
    assert still_serves(server, walker)
    assert caplog.records == []


def test_a_reader_who_stops_reading_gives_the_slot_back(impatient: Served, walker: Walker) -> None:
    left = figure(impatient, 'whit_requests_total{status="499"}')
    with connected(impatient, small=True) as slow:
        body = {"prompt": f"say{walker.words[0]}", "temperature": 0, "stream": True, "max_tokens": LONGEST}
        slow.sendall(posted(body))
        assert eventually(lambda: figure(impatient, "whit_requests_running") == 1)
        assert eventually(lambda: figure(impatient, 'whit_requests_total{status="499"}') == left + 1)
        assert figure(impatient, "whit_requests_running") == 0
    assert still_serves(impatient, walker)


@pytest.mark.parametrize(("stream", "n"), [(True, 1), (False, 6)])
def test_work_for_clients_who_leave_is_ended_while_it_runs_and_while_it_waits(
    server: Served, walker: Walker, stream: bool, n: int
) -> None:
    left = figure(server, 'whit_requests_total{status="499"}')
    body = {"prompt": f"say{walker.words[0]}", "temperature": 0, "stream": stream, "max_tokens": LONGEST}
    leaving = [connected(server) for _ in range(n)]
    for each in leaving:
        each.sendall(posted(body))

    def busy() -> float:
        return figure(server, "whit_requests_running") + figure(server, "whit_requests_waiting")

    assert eventually(lambda: busy() == n)
    for each in leaving:
        each.close()
    assert eventually(lambda: figure(server, 'whit_requests_total{status="499"}') == left + n)
    assert eventually(lambda: busy() == 0)
    assert still_serves(server, walker)


def test_a_runtime_that_dies_is_said_and_nothing_hangs(walker: Walker) -> None:
    with serve(walker.file, Serving(port=0, context=256, slots=1), threads=1, anyway=True) as served:
        workers = [each for each in psutil.Process().children() if "whit.runtime.worker" in each.cmdline()]
        max(workers, key=lambda each: each.create_time()).kill()
        assert eventually(lambda: served.failure() is not None)
        status, text = ask(f"{served.address}/v1/completions", b'{"prompt": "a"}')
        assert (status, "process has ended" in text) == (502, True)
        assert ask(f"{served.address}/health")[0] == 503
        assert ask(f"{served.address}/metrics")[0] == 200


# ---- what is refused beforehand ---------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    walker: Walker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whit.runtime.serve.free_memory", lambda: 1_000_000)
    with (
        pytest.raises(RecipeError, match="with 4 slots: .* are needed .* 0.00 GB are free"),
        serve(walker.file, Serving(port=0)),
    ):
        pass


@pytest.mark.parametrize("option", [{"port": 70000}, {"slots": 0}, {"context": 0}, {"queue": 0}])
def test_impossible_values_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(RecipeError):
        Serving(**option)


def test_only_loopback_addresses_are_local() -> None:
    assert Serving().local
    assert Serving("::1").local
    assert not Serving("0.0.0.0").local
