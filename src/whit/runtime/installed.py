"""The optional packages that running and serving need; each is refused at use, with the line that installs it."""

from __future__ import annotations

import importlib.util

from whit.errors import MissingPackageError

SERVER = ("starlette", "uvicorn", "httpx2", "prometheus_client")


def check_llama() -> None:
    """Raises MissingPackageError without llama.cpp's runtime."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingPackageError("Running a file needs llama.cpp's runtime: pip install 'whit[run]'")


def check_server() -> None:
    """Raises MissingPackageError without what a server is made of."""
    missing = [name for name in SERVER if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"Serving needs {', '.join(missing)}: pip install 'whit[serve]'")
