"""Where the text of a measurement comes from and how it is cut."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from whit.calibration.text import Text, default_text, documentation_text, first_windows, read_text, windows
from whit.errors import TextError


@pytest.fixture(scope="module")
def held_out() -> Text:
    return documentation_text("held-out")


@pytest.fixture(scope="module")
def calibration() -> Text:
    return documentation_text("calibration")


def test_the_two_parts_share_no_paragraph_of_60_characters(held_out: Text, calibration: Text) -> None:
    parts = [{paragraph.strip() for paragraph in text.content.split("\n\n")} for text in (held_out, calibration)]
    assert [paragraph for paragraph in parts[0] & parts[1] if len(paragraph) >= 60] == []


def test_both_parts_are_long_enough_to_measure_and_to_calibrate(held_out: Text, calibration: Text) -> None:
    assert len(held_out.content) > 200_000
    assert len(calibration.content) > 200_000


def test_the_text_is_the_same_in_another_process_with_another_hash_seed(held_out: Text) -> None:
    program = "from whit.calibration.text import default_text; import sys; sys.stdout.write(default_text().content)"
    run = [sys.executable, "-X", "utf8", "-c", program]
    again = subprocess.run(run, capture_output=True, check=True, env={"PYTHONHASHSEED": "12345"})
    assert again.stdout.decode() == held_out.content


def test_the_default_is_the_held_out_part(held_out: Text) -> None:
    assert default_text() == held_out
    assert "held-out" in held_out.description
    assert "Python" in held_out.description


def test_every_topic_of_the_language_reference_is_in_one_of_the_parts(held_out: Text, calibration: Text) -> None:
    from pydoc_data.topics import topics  # type: ignore[import-untyped]

    for topic in topics.values():
        longest = max(topic.strip().split("\n\n"), key=len).strip()
        assert (longest in held_out.content) != (longest in calibration.content)


def test_docstrings_are_read_without_importing_their_modules() -> None:
    program = (
        "import sys; import whit.calibration.text as t; before = set(sys.modules); t.default_text(); "
        "print(sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    assert {"antigravity", "this", "tkinter", "idlelib", "pydoc_data.topics"}.isdisjoint(ast.literal_eval(loaded))


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Zwölf\r\nBoxkämpfer".encode())
    text = read_text(tmp_path / "a.txt")
    assert text.content == "Zwölf\r\nBoxkämpfer"
    assert text.name == "a.txt"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"absent\.txt: cannot be read"):
        read_text(tmp_path / "absent.txt")


def test_bytes_that_are_not_text_are_refused_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc\xff\xfe")
    with pytest.raises(TextError, match="not UTF-8 text .byte 3."):
        read_text(tmp_path / "a.bin")


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    cut = windows(list(range(1100)))
    assert cut.tolist() == [list(range(512)), list(range(512, 1024))]
    assert cut.dtype == torch.int64


def test_a_limit_takes_windows_from_the_start() -> None:
    assert windows(range(1100), length=100, limit=3).tolist() == torch.arange(300).view(3, 100).tolist()
    assert windows(range(1100), length=100, limit=99).shape == (11, 100)


def test_a_text_too_short_to_score_says_how_short() -> None:
    with pytest.raises(TextError, match="has 511 tokens, one window takes 512"):
        windows(range(511))


def test_an_empty_text_is_too_short() -> None:
    with pytest.raises(TextError, match="has 0 tokens"):
        windows([])


def test_no_windows_are_not_a_measurement() -> None:
    with pytest.raises(TextError, match="0 windows"):
        windows(range(600), limit=0)


def test_the_first_windows_are_those_of_the_whole_text_and_not_all_of_it_is_encoded() -> None:
    given: list[int] = []

    def encode(text: str) -> list[int]:
        given.append(len(text))
        return list(text.encode())

    text = Text("digits", "", "0123456789" * 1000)
    assert torch.equal(first_windows(text, encode, 16, 3), windows(list(text.content.encode()), 16, 3))
    assert given[0] < 1000
