"""Sources that fail in the middle of a run: named as such, nothing half-written, state kept."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.reading import BoundedFile
from whit.cli.app import run


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", folder)
    return folder


def quantize(model: Path, out: Path) -> int:
    settings = ["--recipe", "q4_0", "--preset", "fast", "--windows", "2", "--no-verify"]
    return run(["quantize", str(model), "-o", str(out), *settings])


def damaged_at(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, happens: Callable[[BoundedFile], None]) -> int:
    """The status of a run in which something happens to the source once the first block is finished."""
    fill, state = BoundedFile._fill, out.with_name(f".{out.name}.quantizing")

    def filled(file: BoundedFile, into: memoryview, offset: int, what: str) -> None:
        if file.path.suffix == ".safetensors" and (state / "block-00000").exists():
            happens(file)
        fill(file, into, offset, what)

    with monkeypatch.context() as patched:
        patched.setattr(BoundedFile, "_fill", filled)
        return quantize(model, out)


@pytest.mark.parametrize("what", ["shorter", "unreadable"])
def test_a_source_that_fails_in_the_middle(
    llama: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = Path(shutil.copytree(llama, tmp_path / "model")), tmp_path / "a.gguf"

    def shorter(file: BoundedFile) -> None:
        os.truncate(file.path, 1000)

    def unreadable(file: BoundedFile) -> None:
        file._file = Unreadable()  # type: ignore[assignment]

    assert damaged_at(model, out, monkeypatch, {"shorter": shorter, "unreadable": unreadable}[what]) == 2
    shown = capsys.readouterr().err
    assert {"shorter": "became shorter while", "unreadable": "cannot be read (Input/output error)"}[what] in shown
    assert str(model / "model.safetensors") in shown
    assert "Finished blocks (1) are kept" in shown
    assert {each.name for each in tmp_path.iterdir()} == {"model", ".a.gguf.quantizing"}
    shutil.copy(llama / "model.safetensors", model)
    assert quantize(model, out) == 0
    assert quantize(model, tmp_path / "b.gguf") == 0
    assert out.read_bytes() == (tmp_path / "b.gguf").read_bytes()


class Unreadable:
    """A file on a disk that is broken."""

    def seek(self, offset: int) -> None:
        """Works as ever."""

    def readinto(self, into: memoryview) -> int:
        """Fails as the system says it."""
        raise OSError(errno.EIO, os.strerror(errno.EIO))
