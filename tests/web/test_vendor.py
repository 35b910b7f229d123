"""The browsers' runtime: fetched with npm, and never used unless its checksums agree."""

import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from whit.errors import BrokenFileError, MissingPackageError, WhitError
from whit.web import vendor
from whit.web.vendor import Asset, fetch, runtime_files

CONTENT = b"export const answer = 42;\n"
ASSETS = (
    Asset("a.js", "@scope/one", "package/esm/a.js", hashlib.sha256(CONTENT).hexdigest()),
    Asset("b.js", "@scope/two", "package/b.js", hashlib.sha256(CONTENT).hexdigest()),
)


@pytest.fixture
def npm(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """An npm that packs what the dictionary holds for a package."""
    offered = {"@scope/one@" + vendor.VERSION: CONTENT, "@scope/two@" + vendor.VERSION: CONTENT}

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        package = command[command.index("pack") + 1]
        if package not in offered:
            return subprocess.CompletedProcess(command, 1, "", "npm error code E404\nnpm error 404 Not Found")
        target = Path(command[command.index("--pack-destination") + 1])
        member = next(a.member for a in ASSETS if package.startswith(a.package + "@"))
        with tarfile.open(target / "it.tgz", "w:gz") as archive:
            header = tarfile.TarInfo(member)
            header.size = len(offered[package])
            archive.addfile(header, io.BytesIO(offered[package]))
        return subprocess.CompletedProcess(command, 0, "it.tgz", "")

    monkeypatch.setattr(vendor, "ASSETS", ASSETS)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    return offered


def test_what_npm_packs_is_what_a_page_gets(npm: dict[str, bytes], tmp_path: Path) -> None:
    fetch(tmp_path / "vendor")
    files = runtime_files(tmp_path / "vendor")
    assert [file.name for file in files] == ["a.js", "b.js"]
    assert {file.read_bytes() for file in files} == {CONTENT}


def test_another_content_is_refused_and_not_kept(npm: dict[str, bytes], tmp_path: Path) -> None:
    npm["@scope/one@" + vendor.VERSION] = CONTENT + b"steal();\n"
    with pytest.raises(BrokenFileError, match="another checksum"):
        fetch(tmp_path / "vendor")
    assert not list((tmp_path / "vendor").iterdir())


def test_a_failing_npm_is_quoted(npm: dict[str, bytes], tmp_path: Path) -> None:
    del npm["@scope/two@" + vendor.VERSION]
    with pytest.raises(WhitError, match=r"@scope/two.*404 Not Found"):
        fetch(tmp_path / "vendor")


def test_without_npm_the_message_says_where_it_comes_from(
    npm: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"Node\.js"):
        fetch(tmp_path / "vendor")


def test_a_missing_and_a_changed_file_are_told_apart(npm: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match=r"python -m whit\.web\.vendor"):
        runtime_files(tmp_path)
    fetch(tmp_path)
    (tmp_path / "b.js").write_bytes(CONTENT[:-1])
    with pytest.raises(BrokenFileError, match=r"b\.js"):
        runtime_files(tmp_path)
