import importlib.util

import pytest

from whit.errors import MissingPackageError
from whit.runtime.installed import check_llama, check_server


def test_what_is_installed_is_enough() -> None:
    check_llama()
    check_server()


def test_what_is_missing_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("uvicorn", "xllamacpp") else name)
    with pytest.raises(MissingPackageError, match=r"pip install 'whit\[run\]'"):
        check_llama()
    with pytest.raises(MissingPackageError, match=r"needs uvicorn: pip install 'whit\[serve\]'"):
        check_server()
