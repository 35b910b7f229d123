"""`whit report` from the command line: the page, its pictures, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from trained import save_trained
from whit.cli.app import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "model"
    save_trained(folder, steps=40)
    arguments = ["--rounding", "nearest", "--no-verify", "-o", str(folder.parent / "a.gguf")]
    assert run(["quantize", str(folder), "--recipe", "q4_0", *arguments]) == 0
    return folder


def test_a_page_and_its_pictures_are_written_whole(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model.parent
    imatrix, out = folder / "imp.gguf", folder / "r.html"
    assert run(["imatrix", str(model), "--calib", "docs", "--windows", "2", "-o", str(imatrix)]) == 0
    files = [str(folder / "a.gguf"), str(folder / "broken.gguf")]
    Path(files[1]).write_bytes(b"GGUF")
    arguments = ["report", *files, "--against", str(model), "--windows", "2", "--imatrix", str(imatrix), "-o", str(out)]
    capsys.readouterr()
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "Which file to take:" in shown
    assert "broken.gguf was not measured" in shown
    assert out.read_text().startswith("<!doctype html>")
    assert "The importance matrix imp.gguf" in out.read_text()
    assert str(folder) not in out.read_text()
    pictures = sorted(path.name for path in (folder / "r-pictures").iterdir())
    drawn = ("frontier", "layers-a.gguf", "tokens")
    assert pictures == sorted(f"{name}.{suffix}" for name in drawn for suffix in ("png", "svg"))
    assert f"6 pictures in {folder / 'r-pictures'}" in shown

    before = out.read_bytes()
    assert run(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    out.unlink()
    assert run(arguments) == 2  # the pictures alone are reason enough
    assert "r-pictures" in capsys.readouterr().err
    assert run([*arguments, "--force"]) == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"file": "none.gguf"}, "no such file"),
        ({"--against": "nowhere"}, "no such file or folder"),
        ({"-o": "no/where.html"}, "no such folder"),
        ({"--pictures": "a.gguf"}, "is a file"),
        ({"--imatrix": "a.gguf"}, "holds no importance matrix"),
    ],
)
def test_what_is_wrong_is_said_first(
    model: Path, changed: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model.parent)
    options = {"file": "a.gguf", "--against": "model", "-o": "new.html", **changed}
    file = options.pop("file")
    assert run(["report", file, *(part for option in options.items() for part in option)]) == 2
    assert said in capsys.readouterr().err
    assert not Path("new.html").exists()
    assert not Path("new-pictures").exists()
