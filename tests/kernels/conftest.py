"""Every kind of native code that this processor has, one after the other."""

from collections.abc import Iterator

import pytest

from whit.kernels import library

SETS = ("none", "generic", "avx2", "avx512-vnni", "avx512-vnni, four tiles", "neon")


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Use the kernels of one instruction set; skipped where the processor or the build lacks them."""
    if request.param == "none":
        monkeypatch.setattr(library, "NATIVE", None)
        yield "none"
        return
    if library.NATIVE is None:
        pytest.skip("the package was built without a compiler")
    best = library.NATIVE.name
    if not library.NATIVE.choose(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.NATIVE.choose(best)
