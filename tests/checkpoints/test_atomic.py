import errno
from pathlib import Path

import pytest

from whit.checkpoints.atomic import whole_file
from whit.errors import OutputError


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
