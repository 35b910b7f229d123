"""How docstrings reach the site: the first paragraph as a sentence, the rest as it stands, because it has columns."""

from __future__ import annotations

from typing import Any

import griffe


class Columns(griffe.Extension):
    """Puts everything below a docstring's first paragraph into a block whose lines stay apart."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is None:
            return
        summary, _, rest = obj.docstring.value.partition("\n\n")
        obj.docstring.value = f"{summary}\n\n```text\n{rest.rstrip()}\n```" if rest.strip() else summary
