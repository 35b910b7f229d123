"""The compiled library is found, or is None."""

from __future__ import annotations

import shutil

import pytest

from whit import native
from whit.kernels.library import NATIVE


def test_kernels_and_grids_share_one_library() -> None:
    assert (native.LIBRARY is None) == (NATIVE is None)
    assert NATIVE is None or NATIVE.library is native.LIBRARY


def test_a_built_library_has_all_that_is_called() -> None:
    assert native.LIBRARY is None or all(
        hasattr(native.LIBRARY, name)
        for name in (
            *("whit_linear", "whit_dequantize", "whit_rows", "whit_segments", "whit_nearest_groups"),
            *("whit_nearest_superblocks", "whit_join_codes", "whit_interleave"),
        )
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler to build it with")
def test_where_there_is_a_compiler_it_was_built() -> None:
    assert native.LIBRARY is not None
