"""The bar is for terminals only."""

import io
import sys

import pytest

from whit.cli.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_drawn_when_stderr_is_not_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("measuring") as report:
        report(1, 2, "reading")
    assert capfd.readouterr() == ("", "")


def test_a_terminal_sees_what_is_done_how_far_and_what_part(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("measuring") as report:
        report(1, 4, "reading with a.gguf")
    drawn = terminal.getvalue()
    assert "measuring" in drawn
    assert "25%" in drawn
    assert "reading with a.gguf" in drawn


def test_the_bar_is_gone_when_the_work_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(KeyboardInterrupt):
        interrupted_work()
    assert terminal.getvalue().endswith("\x1b[2K")  # the line of the bar is erased


def interrupted_work() -> None:
    with progress_bar("measuring") as report:
        report(1, 4, "")
        raise KeyboardInterrupt
