"""Pictures of any report can be drawn, the same every time, and stand in a page beside each other."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from facts import file, matrix, report
from whit.report.facts import Report
from whit.report.pictures import Picture, inline, picture_names, pictures, save_pictures

HOSTILE = '$\\frac{1$ <script>"x"&\u6f22.gguf'


@pytest.fixture(scope="module")
def made() -> Report:
    faulty = (matrix("attn_q", 0), matrix("attn_q", 1, fault="a scale is zero", error=0.4), matrix("odd$_x", 1))
    return report(
        file(HOSTILE, 90_000_000, 0.3), file("b.gguf", 140_000_000, 0.002, matrices=faulty), file("broken", 7, None)
    )


@pytest.fixture(scope="module")
def drawn(made: Report) -> tuple[Picture, ...]:
    return pictures(made)


def test_every_file_that_could_be_read_has_its_map(made: Report, drawn: tuple[Picture, ...]) -> None:
    assert [each.file for each in drawn] == [None, None, 0, 1]
    assert [each.name for each in drawn][:2] == ["frontier", "tokens"]
    assert {each.name for each in drawn} <= set(picture_names([each.name for each in made.files]))


def test_names_of_pictures_are_plain_and_distinct() -> None:
    names = picture_names(["a/b", "a b", "..", "c"])
    assert len(set(names)) == 6
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)


def test_files_are_whole_pictures(drawn: tuple[Picture, ...], tmp_path: Path) -> None:
    paths = save_pictures(drawn, tmp_path)
    assert len(paths) == len(list(tmp_path.iterdir())) == 2 * len(drawn)
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(path.read_bytes()).tag.endswith("svg")


def test_inline_pictures_have_their_own_ids_the_pages_ink_and_letters(drawn: tuple[Picture, ...]) -> None:
    found = [str(inline(each)) for each in drawn]
    assert found == [str(inline(each)) for each in drawn]
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in found]
    assert sum(map(len, ids)) == len(set.union(*ids))
    for svg, own in zip(found, ids, strict=True):
        root = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert "script" not in {element.tag.split("}")[-1] for element in root.iter()}
        assert "#000000" not in svg
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', svg)) <= own
        assert root.findall(".//{*}text") or root.findall(".//text")
    assert 'xlink:href="http' not in "".join(found)
    labels = "".join(ElementTree.fromstring(found[0]).itertext())
    assert "<script>" in labels  # as letters


def test_a_text_alternative_says_the_figures(drawn: tuple[Picture, ...]) -> None:
    assert "90.0 MB, 0.3 nats" in drawn[0].says
    assert "99 % below" in drawn[1].says
    assert "to 40.0% in blk.1.attn_q. Faults in blk.1.attn_q." in drawn[3].says
