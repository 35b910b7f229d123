import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from whit.checkpoints.atomic import check_apart, own_files, whole_file, whole_folder
from whit.errors import OutputError

HOLD = """
import sys, time
from pathlib import Path
from whit.checkpoints.atomic import whole_file, whole_folder
with (whole_folder if sys.argv[2] == "folder" else whole_file)(Path(sys.argv[1]), 0, True) as it:
    (it.write(b"theirs") if sys.argv[2] == "file" else (it / "config.json").write_text("theirs"))
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with whole_file(path, 3, overwrite=False) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_a_failure_and_the_old_file_stays(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(failure), whole_file(path, 3, overwrite=True) as file:  # noqa: PT012
        file.write(b"new")
        raise failure
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(OutputError, match="--force"), whole_file(tmp_path / "out", 1, overwrite=False):
        pass


def test_a_disk_that_fills_up_is_named_and_cleaned(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"), whole_file(tmp_path / "out", 1, overwrite=False):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_refused_before_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"needs .* GB but only"),
        whole_file(tmp_path / "out", 10**18, overwrite=False),
    ):
        pass


@pytest.mark.parametrize("where", ["missing/out", "."])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, where: str) -> None:
    with (
        pytest.raises(OutputError, match=r"no such folder|is a folder"),
        whole_file(tmp_path / where, 1, overwrite=True),
    ):
        pass


def old_folder(path: Path) -> dict[str, str]:
    """A folder of a model and other things, and what must stay of it when `model*` is replaced."""
    (path / "more").mkdir(parents=True)
    for name in ("model.1", "model.2", "notes.txt", "more/model.3", "tokenizer.json"):
        (path / name).write_text(f"old {name}")
    (path / "link").symlink_to("notes.txt")
    (path / "astray").symlink_to("nowhere")
    return {name: f"old {name}" for name in ("notes.txt", "more/model.3")} | {"link": "old notes.txt"}


@pytest.mark.parametrize("links", [True, False])
def test_only_files_of_ones_own_are_replaced(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr("os.link", refused)
    path = tmp_path / "out"
    kept = old_folder(path)
    with own_files(path, 3, ["model.*"]) as partial:
        (partial / "model.1").write_text("new")
        (partial / "tokenizer.json").write_text("new")  # whatever its name: what is written is what stays
    assert {name: (path / name).read_text() for name in kept} == kept
    assert (path / "model.1").read_text() == (path / "tokenizer.json").read_text() == "new"
    assert not (path / "model.2").exists()
    assert (path / "link").is_symlink()
    assert (path / "astray").is_symlink()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
def test_all_files_stay_after_a_failure(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "out"
    kept = old_folder(path) | {name: f"old {name}" for name in ("model.1", "model.2", "tokenizer.json")}
    with pytest.raises((failure, OutputError)), own_files(path, 3, ["model.*"]) as partial:  # noqa: PT012
        (partial / "model.1").write_text("new")
        raise failure
    assert {name: (path / name).read_text() for name in kept} == kept
    assert list(tmp_path.iterdir()) == [path]


def test_a_whole_folder_replaces_everything(tmp_path: Path) -> None:
    path = tmp_path / "out"
    old_folder(path)
    with pytest.raises(OutputError, match="other things"), whole_folder(path, 3, overwrite=True):
        pass
    (path / "config.json").write_text("{}")
    with whole_folder(path, 3, overwrite=True) as partial:
        (partial / "model.1").write_text("new")
    assert [each.name for each in path.iterdir()] == ["model.1"]
    assert list(tmp_path.iterdir()) == [path]


def holder(path: Path, kind: str) -> subprocess.Popen[str]:
    """Another process that has begun to write `path`, and ends it when its stdin is closed."""
    command = [sys.executable, "-c", HOLD, str(path), kind]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "writing\n"
    return other


@pytest.mark.skipif(sys.platform == "win32", reason="there the system itself refuses")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_runs_do_not_write_the_same_output_at_once(kind: str, tmp_path: Path) -> None:
    path, writer = tmp_path / "out", whole_folder if kind == "folder" else whole_file
    other = holder(path, kind)
    with pytest.raises(OutputError, match="another run is writing it"), writer(path, 0, True):
        pytest.fail("both write")
    other.communicate()
    assert other.returncode == 0
    written = path / "config.json" if kind == "folder" else path
    assert written.read_text() == "theirs"
    with writer(path, 0, True) as it:
        (it / "config.json").write_text("ours") if isinstance(it, Path) else it.write(b"ours")
    assert written.read_text() == "ours"


@pytest.mark.skipif(sys.platform == "win32", reason="there the system itself refuses")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_left_is_no_obstacle(kind: str, tmp_path: Path) -> None:
    path, writer = tmp_path / "out", whole_folder if kind == "folder" else whole_file
    other = holder(path, kind)
    other.kill()
    other.communicate()
    assert (tmp_path / ".out.partial").exists()
    with writer(path, 0, False) as it:
        (it / "whit.json").write_text("ours") if isinstance(it, Path) else it.write(b"ours")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert [each.name for each in path.iterdir()] == ["whit.json"] if kind == "folder" else path.read_bytes() == b"ours"


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="no file that could be replaced"), whole_file(tmp_path / "pipe", 0, True):
        pytest.fail("written")


def test_what_is_read_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.gguf").write_bytes(b"")
    for out in ("model", "model/a.gguf"):
        with pytest.raises(OutputError, match="is read from"):
            check_apart(tmp_path / out, "smollm2-135m", tmp_path / "model" / "a.gguf")
    check_apart(tmp_path / "model" / "b.gguf", tmp_path / "model")
    check_apart(tmp_path / "model" / "a.gguf", tmp_path / "model")
