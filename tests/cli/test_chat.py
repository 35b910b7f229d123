"""`whit chat` from the command line."""

import os
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from walker import Walker
from whit.cli.chat import command
from whit.errors import RecipeError
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


def test_a_line_that_is_not_utf_8_costs_no_other_line(tmp_path: Path) -> None:
    walker = Walker(tmp_path)
    said = b"hello \xff\xfe there\n" + f"say{walker.words[0]}\n/quit\n".encode()
    result = CliRunner().invoke(app, [str(walker.folder), "-n", "5", "--threads", "1"], input=said)
    assert result.exit_code == 0, result.exception
    assert "The line is not UTF-8 from character 7 on" in result.stderr
    assert result.stdout == walker.says(walker.words[0], 5) + "\n"


def test_an_instruction_that_is_not_utf_8_is_refused() -> None:
    result = CliRunner().invoke(app, ["any.gguf", "--system", os.fsdecode(b"a\xff")])
    assert isinstance(result.exception, RecipeError)
    assert "--system is not UTF-8" in str(result.exception)
