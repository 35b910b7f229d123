"""Records on disk, and hostile ones."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from release_records import record
from whit.errors import BrokenFileError
from whit.release.record import checksums, read_records, write_records


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    records = [record("a.gguf", 10, 0.01), replace(record("b", 20, float("inf"), "gptq"), speed=3.5, near="good")]
    write_records(records, tmp_path / "release.json", {"calibration": "text"})
    found, said = read_records(tmp_path / "release.json")
    assert found == records
    assert said == {"calibration": "text"}


def test_checksums_are_those_of_all_files_of_a_variant(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").write_bytes(b"b" * 3_000_000)
    (tmp_path / "a").write_bytes(b"a")
    assert checksums(tmp_path, tmp_path / "a") == {"a": hashlib.sha256(b"a").hexdigest()}
    assert checksums(tmp_path, tmp_path / "folder") == {"folder/b": hashlib.sha256(b"b" * 3_000_000).hexdigest()}
    assert checksums(tmp_path, tmp_path / "missing") == {}


def test_a_record_holds_only_while_its_files_are_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"abc")
    known = replace(record("a.gguf", 3, 0.01), checksums=checksums(tmp_path, tmp_path / "a.gguf"))
    assert known.holds(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"abd")
    assert not known.holds(tmp_path)
    (tmp_path / "a.gguf").unlink()
    assert not known.holds(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../../etc/passwd"},
        {"checksums": {"/etc/passwd": "00"}},
        {"n_bytes": "many"},
        {"result": {"kl_mean": 0.1}},
        {"surprise": 1},
        {"checksums": None},
    ],
)
def test_records_of_strangers_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    content = {"variants": [{**asdict(record("a.gguf", 10, 0.01)), **change}]}
    (tmp_path / "release.json").write_text(json.dumps(content))
    with pytest.raises(BrokenFileError, match="is not what"):
        read_records(tmp_path / "release.json")


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"\xff", b'{"variants": 3}', b"[" * 100_000])
def test_what_is_no_record_at_all_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "release.json").write_bytes(raw)
    with pytest.raises(BrokenFileError):
        read_records(tmp_path / "release.json")
