"""The command as a whole."""

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is the OpenMP of torch on Linux alone")
@pytest.mark.parametrize(("asked", "found"), [({}, SPINS), ({"GOMP_SPINCOUNT": "77"}, "77")])
def test_threads_that_wait_soon_sleep_unless_told_otherwise(asked: dict[str, str], found: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    program = "import sys; from whit.cli.app import main; main(sys.argv[1:])"
    own = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", str(tmp_path)],
        env={**own, **asked, "OMP_DISPLAY_ENV": "verbose"},  # libgomp says what it has read
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{found}'" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_failure(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    command = [sys.executable, "-c", "import sys; from whit.cli.app import main; main(sys.argv[1:])", "inspect"]
    process = subprocess.Popen([*command, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate()
    assert (process.returncode, said) == (0, "")
