"""Files and folders that appear whole or not at all: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from whit.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows does not let two programs write one file anyway
    fcntl = None  # type: ignore[assignment]

MARKS = ("config.json", "whit.json", "page.json")  # a folder with one of them was written by a command like this one


@contextmanager
def whole_file(path: Path, n_bytes: int, overwrite: bool) -> Iterator[BinaryIO]:
    """A binary file to write `n_bytes` into; it takes its name only when the block ends without an error.

    path       final name; the temporary file lies beside it, so that the rename is atomic
    n_bytes    announced size, checked against the free space before anything is written
    overwrite  whether an existing file may be replaced
    Raises OutputError when the file exists, cannot be written, is being written by another run, or the disk is or gets
    full. On any exception, an interrupt included, the temporary file is removed and an older file of that name stays as
    it was.
    """
    check_target(path, n_bytes, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    with alone(partial, path):
        try:
            check_target(path, n_bytes, overwrite)  # another run may just have ended
            with partial.open("r+b") as file:
                file.truncate()
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            synced_folder(path.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(_explain(path, n_bytes, error)) from error
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def alone(path: Path, out: Path, folder: bool = False) -> Iterator[None]:
    """While the context lasts, no other run works in `path`, which is made if it is not there.

    out  what the work is for, for the message
    Raises OutputError when another run does, or `path` cannot be made. Where a disk knows no locks, nobody is kept out.
    """
    try:
        descriptor = _held(path, folder)
    except BlockingIOError:
        raise OutputError(f"{out}: another run is writing it. Wait for that to end, or choose another name.") from None
    except OSError as error:
        raise OutputError(_explain(out, 0, error)) from error
    try:
        yield
    finally:
        os.close(descriptor)


def _held(path: Path, folder: bool) -> int:
    """A descriptor of `path` with a lock. Raises BlockingIOError when another process has it."""
    while True:
        if folder:
            path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that had it gave the file its name, or took it away, before the lock was ours


@contextmanager
def whole_folder(path: Path, n_bytes: int, overwrite: bool) -> Iterator[Path]:
    """A folder to write `n_bytes` of files into; it takes its name only when the block ends without an error.

    Raises OutputError as `whole_file` does; with `overwrite` a folder is replaced that holds a model or nothing, never
    one of another kind. On any exception the temporary folder is removed and an older one stays as it was.
    """
    check_folder(path, n_bytes, overwrite)
    with _complete(path, n_bytes, overwrite) as partial:
        yield partial


@contextmanager
def own_files(path: Path, n_bytes: int, own: Sequence[str]) -> Iterator[Path]:
    """As `whole_folder`, for files that may lie among others: whatever else an older folder holds is kept.

    own  patterns of the names that the writer gives: older files of such names go, whether or not they are written now
    """
    check_folder(path, n_bytes, overwrite=True, among=True)
    with _complete(path, n_bytes, overwrite=True) as partial:
        yield partial
        for other in path.iterdir() if path.is_dir() else ():
            if not any(fnmatch(other.name, pattern) for pattern in own) and not (partial / other.name).exists():
                _keep(other, partial / other.name)


@contextmanager
def _complete(path: Path, n_bytes: int, overwrite: bool) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.partial")
    with alone(partial, path, folder=True):
        try:
            for left in partial.iterdir():  # by a run that was killed
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield partial
            for file in partial.iterdir():
                if not file.is_symlink():  # which leads to what is kept
                    _sync(file)
            _sync(partial)
            moved(partial, path, overwrite)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OutputError(_explain(path, n_bytes, error)) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _keep(old: Path, new: Path) -> None:
    """The same file, link or folder under a second name: the first stays until the folder that it is in is replaced."""
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=_linked)
    else:
        _linked(old, new)


def _linked(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a disk that knows no links
        shutil.copy2(old, new, follow_symlinks=False)


def moved(source: Path, path: Path, overwrite: bool) -> None:
    """Give a complete file or folder its name; an older one goes only when the new one can take its place."""
    if overwrite and path.is_dir():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
        source.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        source.replace(path)
    synced_folder(path.parent)


def check_folder(path: Path, n_bytes: int, overwrite: bool, among: bool = False) -> None:
    """Raise OutputError, before any work, when `whole_folder` would.

    among  whether other things than a model may be there, because they are kept
    """
    if path.is_file():
        raise OutputError(f"{path}: is a file. This format is a folder; give another name.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise OutputError(f"{path}: exists already. Choose another name, or add --force to replace it.")
        if not among and not any((path / name).is_file() for name in MARKS):
            raise OutputError(f"{path}: holds other things than a model and is not replaced. Choose another folder.")
    check_place(path, n_bytes)


def check_target(path: Path, n_bytes: int, overwrite: bool) -> None:
    """Raise OutputError, before any work, when `whole_file` would."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder. Give a file name.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is no file that could be replaced. Give a file name.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already. Choose another name, or add --force to replace it.")
    check_place(path, n_bytes)


def check_apart(out: Path, *read: str | Path) -> None:
    """Raise OutputError when writing `out` would replace what is read, or a file or folder that it lies in."""
    for each in map(Path, read):
        if each.exists() and out.exists() and each.resolve().is_relative_to(out.resolve()):
            raise OutputError(f"{out}: is what {each} is read from. Choose another name.")


def check_place(path: Path, n_bytes: int) -> None:
    """Raise OutputError when so many bytes cannot be written beside what `path` names."""
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder. Create it, or choose another place for {path.name}.")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path.parent}: no permission to write here. Choose another folder.")
    free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        raise OutputError(
            f"{path}: needs {_size(n_bytes)} but only {_size(free)} are free on that disk. "
            "Free some space or choose another disk."
        )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.2f} MB"


def _explain(path: Path, n_bytes: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{path}: the disk is full ({_size(n_bytes)} are needed). Nothing half-written was left; "
            "free some space or choose another disk."
        )
    return f"{path}: cannot be written ({error.strerror or error})."


def synced_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
