"""llama.cpp for browsers: the files of @wllama/wllama, copied into this package when it is built.

They are no part of the repository (30 MB of compiled code). `python -m whit.web.vendor`, which `make web-assets`
calls, fetches the packages with npm; every file must have the checksum that stands here, now and whenever a page is
written, so that a page never runs anything else. A wheel that is built afterwards holds them.

The build for browsers without WebAssembly's promises or 64-bit memory (Safari) comes as a second package.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from whit.checkpoints.atomic import whole_file
from whit.errors import BrokenFileError, MissingPackageError, WhitError

VENDOR = Path(__file__).parent / "vendor"
VERSION = "3.13.0"
FETCH = "python -m whit.web.vendor"


@dataclass(frozen=True)
class Asset:
    """One file of the runtime.

    name     what it is called beside the page
    package  of npm, in version VERSION
    member   its path in the package
    sha256   of its content, hexadecimal
    """

    name: str
    package: str
    member: str
    sha256: str


ASSETS = (
    Asset(
        "wllama.js",
        "@wllama/wllama",
        "package/esm/index.min.js",
        "e7f3745ee508c111c22d178d23c52cc74016dd8cec39e4600d87e28d287d7981",
    ),
    Asset(
        "wllama.wasm",
        "@wllama/wllama",
        "package/esm/wasm/wllama.wasm",
        "79ac5be917b71d50571a4f584436a9f6baf6b6e57719d094ed8bd950e9a65780",
    ),
    Asset(
        "LICENSE.wllama.txt",
        "@wllama/wllama",
        "package/LICENCE",
        "5866e3bd7e3cbd3f7c8bea6efd8a1e7fa7cc8de68c30f428aff7c6584a0fb720",
    ),
    Asset(
        "compat.js",
        "@wllama/wllama-compat",
        "package/wasm/wllama.js",
        "942062a7495790a317061b27a6bcd2bd3b247e2ddef53a069baf5abb07284758",
    ),
    Asset(
        "compat.wasm",
        "@wllama/wllama-compat",
        "package/wasm/wllama.wasm",
        "35df8c1e2f7dbd74b8e8b01054fb9f1fbe86cf566945fbf4cef3965855a8b92e",
    ),
)


def runtime_files(folder: Path = VENDOR) -> list[Path]:
    """The files of the runtime, checked.

    Raises MissingPackageError when one is missing and BrokenFileError when one is not what it should be.
    """
    for asset in ASSETS:
        path = folder / asset.name
        if not path.is_file():
            raise MissingPackageError(
                f"llama.cpp for browsers ({asset.name}) is not part of this installation. With npm (Node.js) on this "
                f"machine, fetch it once: {FETCH}"
            )
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != asset.sha256:
                raise BrokenFileError(f"{path}: is not the file of wllama {VERSION}. Fetch it again: {FETCH}")
    return [folder / asset.name for asset in ASSETS]


def fetch(folder: Path = VENDOR) -> None:
    """Fetch what is missing with npm, from the registry that npm is set up for.

    Raises MissingPackageError without npm, WhitError when it fails, BrokenFileError when a checksum differs; then
    nothing is written.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise MissingPackageError(f"npm is not installed. It comes with Node.js; install it, then: {FETCH}")
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for package in dict.fromkeys(asset.package for asset in ASSETS):
            _unpack(_packed(npm, package, Path(scratch)), [a for a in ASSETS if a.package == package], folder)


def _packed(npm: str, package: str, scratch: Path) -> Path:
    target = scratch / package.rpartition("/")[2]
    target.mkdir()
    command = [npm, "pack", f"{package}@{VERSION}", "--silent", "--pack-destination", str(target)]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    found = list(target.glob("*.tgz"))
    if done.returncode or len(found) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        raise WhitError(f"npm could not fetch {package}@{VERSION}: {reason}. Check the network and npm's registry.")
    return found[0]


def _unpack(archive: Path, assets: list[Asset], folder: Path) -> None:
    with tarfile.open(archive) as members:
        for asset in assets:
            member = members.extractfile(asset.member)
            content = member.read() if member else b""
            if hashlib.sha256(content).hexdigest() != asset.sha256:
                raise BrokenFileError(
                    f"{asset.member} of {asset.package}@{VERSION} has another checksum than expected. "
                    "The registry gave something else; nothing of it was kept."
                )
            with whole_file(folder / asset.name, len(content), overwrite=True) as file:
                file.write(content)


if __name__ == "__main__":
    try:
        runtime_files()
    except WhitError:
        try:
            fetch()
        except WhitError as error:
            sys.exit(f"whit: {error}")
