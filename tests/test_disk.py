"""Disks that fill up and sources that fail while `whit quantize` is at work: nothing half-written, state kept."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.reading import BoundedFile
from whit.cli.app import run

MIB = 1 << 20
FILL = "filler"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB, num_hidden_layers=3)
    save_toy_tokenizer("llama", folder)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=False).returncode:
        pytest.skip("a file system can be mounted by root alone, and not everywhere")
    yield place
    subprocess.run(["umount", place], check=True)


def quantize(model: Path, out: Path) -> int:
    settings = ["--recipe", "q4_0", "--preset", "fast", "--windows", "4", "--no-verify"]
    return run(["quantize", str(model), "-o", str(out), *settings])


def leave(place: Path, n_bytes: int) -> None:
    """Fill a disk but for so many bytes."""
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (place / FILL).write_bytes(bytes(free - n_bytes))


def test_a_disk_that_fills_up_in_the_middle(
    llama: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "a.gguf"
    assert quantize(llama, tmp_path / kind) == 0
    n_bytes, blocks = (tmp_path / kind).stat().st_size, []
    for more in range(MIB // 4, MIB, MIB // 8):  # until it fills up where some blocks are finished
        leave(small, n_bytes + more)
        capsys.readouterr()
        assert quantize(llama, small / kind) == 2
        shown = capsys.readouterr().err
        assert "the disk is full" in shown or "are free on that disk" in shown
        assert {each.name for each in small.iterdir()} <= {FILL, f".{kind}.quantizing"}
        blocks = sorted(each.name for each in (small / f".{kind}.quantizing").glob("block-*"))
        if blocks:
            assert f"Finished blocks ({len(blocks)}) are kept" in shown
            break
        (small / FILL).unlink()
    assert blocks
    (small / FILL).unlink()
    assert quantize(llama, small / kind) == 0
    assert (small / kind).read_bytes() == (tmp_path / kind).read_bytes()
    assert [each.name for each in small.iterdir()] == [kind]


def damaged_at(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, happens: object) -> int:
    """The status of a run in which something happens to the source once the first block is finished."""
    fill, state = BoundedFile._fill, out.with_name(f".{out.name}.quantizing")

    def filled(file: BoundedFile, into: memoryview, offset: int, what: str) -> None:
        if file.path.suffix == ".safetensors" and (state / "block-00000").exists():
            happens(file)  # type: ignore[operator]
        fill(file, into, offset, what)

    with monkeypatch.context() as patched:
        patched.setattr(BoundedFile, "_fill", filled)
        return quantize(model, out)


def copied(model: Path, place: Path) -> Path:
    return Path(shutil.copytree(model, place))


@pytest.mark.parametrize("what", ["shorter", "unreadable"])
def test_a_source_that_fails_in_the_middle(
    llama: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = copied(llama, tmp_path / "model"), tmp_path / "a.gguf"

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
