"""The compiled library, found beside the kernels when the package was built with a compiler, and loaded through ctypes.

It has no Python in it and no torch, so that one build serves every version of both. Whoever calls into it says what its
functions take (kernels/library.py, grids/kmeans.py) and has the same in torch or numpy for where it is None.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("kernels") / f"_native{suffix}"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # built for another machine
                return None
    return None


LIBRARY = _load()
