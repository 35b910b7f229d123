"""Memory that was freed, given back to the system.

glibc keeps what was freed in pieces below a threshold that grows up to 32 MB: of a block's weights and statistics,
nearly everything, with holes that the next block does not fit in.
"""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3
LARGE = 1 << 22  # bytes


def return_memory() -> None:
    """Ask the C library to hand back what it keeps for later. Elsewhere than on Linux there is nothing to ask for."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def keep_large_apart() -> None:
    """From now on each piece of at least LARGE bytes is the system's own again as soon as it is freed.

    For runs whose memory must not grow with their length; a page fault per page is what it costs.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if option is not None:
        option(M_MMAP_THRESHOLD, LARGE)
