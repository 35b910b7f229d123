"""The command as a whole."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from tiny import save_tiny
from whit.cli.app import SPINS, VERBS, run


def test_the_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown and summary in shown for verb, (_, summary) in VERBS.items())


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("whit ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert f"Usage: whit {verb}" in capsys.readouterr().out


def test_negative_numbers_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "-3.5"]) == 0
    assert "-3.5" in capsys.readouterr().out


def whit(*arguments: str, out: IO[str] | int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from whit.cli.app import main; main(sys.argv[1:])"
    command, own = [sys.executable, "-c", program, *arguments], {**os.environ, **environment}
    return subprocess.run(command, env=own, stdout=out, stderr=subprocess.PIPE, text=True, encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is the OpenMP of torch on Linux alone")
@pytest.mark.parametrize(("asked", "found"), [(None, SPINS), ("77", "77")])
def test_threads_that_wait_soon_sleep_unless_told_otherwise(
    asked: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    said = {} if asked is None else {"GOMP_SPINCOUNT": asked}
    done = whit("inspect", str(tmp_path), OMP_DISPLAY_ENV="verbose", **said)  # libgomp says what it has read
    assert f"GOMP_SPINCOUNT = '{found}'" in done.stderr


def test_a_terminal_that_lacks_letters_is_shown_their_numbers() -> None:
    done = whit("explain", "π", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 2
    assert "\\u03c0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_is_full_is_told(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = whit("explain", "3.5", out=full)
    assert (done.returncode, done.stderr) == (2, "whit: cannot be read or written (No space left on device).\n")


def test_an_importance_matrix_is_not_made_for_a_place_that_is_taken(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "taken.gguf").write_bytes(b"mine")
    done = whit("imatrix", str(tmp_path / "model"), "-o", str(tmp_path / "taken.gguf"))
    assert done.returncode == 2
    assert "taken.gguf: exists already" in done.stderr
    assert done.stdout == ""


def test_a_reader_that_has_seen_enough_is_no_failure(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    command = [sys.executable, "-c", "import sys; from whit.cli.app import main; main(sys.argv[1:])", "inspect"]
    process = subprocess.Popen([*command, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate()
    assert (process.returncode, said) == (0, "")
