"""`whit chat` from the command line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from walker import Walker
from whit.cli.chat import command
from whit.models.builtin import packaged_smollm2

app = typer.Typer()
app.command()(command)


@pytest.mark.real_model
def test_a_conversation_remembers_counts_and_forgets() -> None:
    said = "My name is Ada.\n/stats\nWhat is my name?\n/reset\n/stats\n/what\n/quit\nnever read\n"
    result = CliRunner().invoke(app, [str(packaged_smollm2()), "-n", "24", "--threads", "1"], input=said)
    assert result.exit_code == 0, result.exception
    assert result.stdout.count("Ada") >= 1
    assert "answer " in result.stderr
    assert "no complete answer yet" in result.stderr
    assert result.stderr.count("/reset") == 2  # at the start, and for the unknown command


def test_a_line_that_is_no_text_does_not_end_the_conversation(tmp_path: Path) -> None:
    walker = Walker(tmp_path)
    program = "import sys; from whit.cli.app import main; main(sys.argv[1:])"
    said = b"what \xff\xfe\n" + f"say{walker.words[0]}\n/quit\n".encode()
    command = [sys.executable, "-c", program, "chat", str(walker.folder), "-n", "5", "--threads", "1"]
    done = subprocess.run(command, input=said, capture_output=True)
    assert done.returncode == 0
    assert b"no text in UTF-8" in done.stderr
    assert done.stdout.decode() == walker.says(walker.words[0], 5) + "\n"


def test_a_folder_talks_too_and_tells_speed_first_text_and_memory(tmp_path: Path) -> None:
    walker = Walker(tmp_path)
    said = f"say{walker.words[0]}\n/stats\n/quit\n"
    result = CliRunner().invoke(app, [str(walker.folder), "-n", "5", "--threads", "1"], input=said)
    assert result.exit_code == 0, result.exception
    assert result.stdout == walker.says(walker.words[0], 5) + "\n"
    assert re.search(
        r"prompt \d+ new tokens at [\d.]+/s, first text after [\d.]+ s, answer 5 tokens at [\d.]+/s; memory [\d.]+ GB",
        result.stderr,
    )
