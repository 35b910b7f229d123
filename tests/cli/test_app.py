import pytest

from whit.cli.app import VERBS, run


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
