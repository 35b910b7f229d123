"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import sys


def return_memory() -> None:
    """Ask the C library to hand back what it keeps for later.

    glibc keeps whatever was freed in pieces below a threshold that grows up to 32 MB: of a block's weights and
    statistics, nearly everything. Elsewhere there is nothing to ask for.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
