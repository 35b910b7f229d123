"""`whit run` from the command line."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from walker import LAST, Walker
from whit.cli.run import command
from whit.errors import BrokenFileError
from whit.models.builtin import packaged_smollm2

app = typer.Typer()
app.command()(command)


@pytest.mark.real_model
def test_the_answer_goes_to_stdout_and_one_line_of_figures_to_stderr() -> None:
    options = ["--raw", "-n", "3", "--threads", "1"]
    result = CliRunner().invoke(app, [str(packaged_smollm2()), "The capital of France is", *options])
    assert result.stdout == " Paris.\n\n"
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("prompt 5 tokens at ")
    assert "answer 3 tokens at " in result.stderr
    assert "cut off: -n allows a longer answer" in result.stderr


def test_a_file_that_cannot_be_read_is_an_error_for_the_user(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GG")
    result = CliRunner().invoke(app, [str(tmp_path / "a.gguf"), "hi"])
    assert isinstance(result.exception, BrokenFileError)
    assert result.stdout == ""


def test_a_folder_answers_too_and_says_when_it_was_cut_off(tmp_path: Path) -> None:
    walker = Walker(tmp_path)
    result = CliRunner().invoke(app, [str(walker.folder), f"say{walker.words[0]}", "-n", "4", "--threads", "1"])
    assert result.stdout == walker.says(walker.words[0], 4) + "\n"
    assert "answer 4 tokens at " in result.stderr
    assert "cut off: -n allows a longer answer" in result.stderr
    ended = CliRunner().invoke(app, [str(walker.folder), LAST, "--threads", "1"])
    assert "cut off" not in ended.stderr
