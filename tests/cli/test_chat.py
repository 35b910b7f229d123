"""`whit chat` from the command line."""

import pytest
import typer
from typer.testing import CliRunner

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
