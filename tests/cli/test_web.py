"""`whit web` from the command line."""

from pathlib import Path

import pytest

from toy_tokenizers import write_vocabulary
from whit.cli.app import run
from whit.web import page


def test_a_page_is_written_once_and_replaced_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "runtime_files", list)
    file = write_vocabulary({"general.name": "Toy", "tokenizer.ggml.model": "gpt2"}, tmp_path / "toy.gguf")
    out = tmp_path / "page"
    assert run(["web", str(file), "-o", str(out), "--about", "Made of wood."]) == 0
    shown = capsys.readouterr().out
    assert "has no chat template" in shown
    assert f"python -m http.server -d {out}" in shown
    html = (out / "index.html").read_text()
    assert "<h1>Toy</h1>" in html
    assert "Made of wood." in html
    assert run(["web", str(file), "-o", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["web", str(file), "-o", str(out), "--force", "--title", "Tree"]) == 0
    assert "<h1>Tree</h1>" in (out / "index.html").read_text()


def test_a_folder_that_is_no_page_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "runtime_files", list)
    file = write_vocabulary({"tokenizer.ggml.model": "gpt2"}, tmp_path / "toy.gguf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert run(["web", str(file), "-o", str(tmp_path / "mine"), "--force"]) == 2
    assert "is not replaced" in capsys.readouterr().err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
