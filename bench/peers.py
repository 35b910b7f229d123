"""The peers: llama.cpp's own tools, built from the sources that a Python package carries.

Everything lands in bench/work and is reused: an environment with cmake, the sources, and the built tools.
The build is for this machine (native instructions), as a user of llama.cpp would do it.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
from pathlib import Path

WORK = Path(__file__).parent / "work"
SOURCE_PACKAGE = "llama-cpp-python==0.3.36"
TOOLS = ("llama-quantize", "llama-perplexity", "llama-imatrix", "llama-bench")


def llama_cpp(tool: str) -> Path:
    """The path of one of TOOLS, built on first use (the first takes about ten minutes on two cores)."""
    binary = WORK / "llama.cpp" / "build" / "bin" / tool
    if not binary.exists():
        _build(_cmake(), _sources(), tool)
    return binary


def _cmake() -> Path:
    env = WORK / "venv"
    if not (env / "bin" / "cmake").exists():
        venv.create(env, with_pip=True)
        _run(env / "bin" / "python", "-m", "pip", "install", "-q", "cmake>=3.28,<4")
    return env / "bin" / "cmake"


def _sources() -> Path:
    target = WORK / "llama.cpp"
    if not target.exists():
        pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:")
        _run(*pip, "-d", WORK, SOURCE_PACKAGE)
        (archive,) = WORK.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                _, inside, name = member.name.partition("/vendor/llama.cpp/")
                if inside:
                    member.name = name
                    tar.extract(member, target, filter="data")
    return target


def _build(cmake: Path, source: Path, tool: str) -> None:
    options = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF")
    _run(cmake, "-S", source, "-B", source / "build", "-DLLAMA_BUILD_EXAMPLES=OFF", *options)
    _run(cmake, "--build", source / "build", "-j2", "-t", tool)


def _run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
