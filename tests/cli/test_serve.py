"""`whit serve` as a process: how it ends, and a port that somebody else has."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from walker import CONTEXT, Walker, posted
from whit.cli.app import run

LONGEST = 120_000  # tokens of an answer: minutes of work


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    return Walker(tmp_path_factory.mktemp("walker"))


@pytest.fixture
def heard() -> Iterator[None]:
    """Processes that are started hear Ctrl-C, also when these tests run where a shell has turned it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("kind", "number"), [("file", signal.SIGTERM), ("folder", signal.SIGINT)])
def test_signals_end_it_with_status_0_and_nothing_is_left(walker: Walker, kind: str, number: int) -> None:
    command = [sys.executable, "-c", "from whit.cli.app import main; main()", "serve", str(getattr(walker, kind))]
    options = ["--port", "0", "--threads", "1", "--context", str(CONTEXT), "-n", str(LONGEST), "--anyway"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = process.stderr.readline().split()[2]
            port = int(address.split(":")[2].split("/")[0])
            children = psutil.Process(process.pid).children(recursive=True)
            assert len(children) == (1 if kind == "file" else 0)
            with socket.create_connection(("127.0.0.1", port), 60) as reader:
                reader.sendall(posted({"prompt": f"say{walker.words[0]}", "stream": True, "max_tokens": LONGEST}))
                assert b"200 OK" in reader.recv(4096)
                os.kill(process.pid, number)
                assert process.wait(60) == 0
            assert process.stderr.read() == "whit: the server has ended.\n"
            assert not any(each.is_running() for each in children)
        finally:
            process.kill()  # or a server that does not end would be waited for


def test_a_port_that_is_taken_is_a_message(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["serve", str(walker.file), "--port", str(port)]) == 2
    shown = capsys.readouterr().err
    assert shown == (
        f"whit: 127.0.0.1:{port} cannot be listened on (Address already in use); choose another --port or --host.\n"
    )
