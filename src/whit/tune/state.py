"""The state of a training, kept beside its output: a run that was killed goes on, and ends with the same bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from whit.checkpoints.atomic import whole_file
from whit.errors import OutputError
from whit.tune.train import Run

SECONDS = 180.0  # between two copies


class Keeper:
    """Where the state of one training lies.

    path  of the state, hidden beside the output
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, str], seconds: float | None = None) -> None:
        """fingerprint  what must be the same, by what a person calls it"""
        self.path = out.with_name(f".{out.name}.tuning.safetensors")
        self._fingerprint, self._seconds, self._last = (
            dict(fingerprint),
            SECONDS if seconds is None else seconds,
            time.monotonic(),
        )

    def restore(self, run: Run) -> None:
        """Go on where an earlier run was, if there was one. Raises OutputError when it was another training."""
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, "pt") as file:
                theirs = json.loads((file.metadata() or {}).get("training", "{}"))
                other = [name for name, value in self._fingerprint.items() if theirs.get(name) != value]
                if other:
                    raise OutputError(
                        f"{self.path} is the state of a training with another {', '.join(other)}. Delete it to begin "
                        "anew, or repeat the command that it is of."
                    )
                run.recall({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, no mapping
        except SafetensorError as error:
            raise OutputError(f"{self.path} cannot be read ({error}). Delete it to begin anew.") from error

    def save(self, run: Run) -> None:
        """Keep the state, if the last copy is old enough. Raises OutputError."""
        if time.monotonic() - self._last < self._seconds:
            return
        memory = {name: each.contiguous() for name, each in run.memory().items()}
        with whole_file(self.path, sum(each.nbytes for each in memory.values()), True) as file:
            save_file(memory, file.name, {"training": json.dumps(self._fingerprint)})
        self._last = time.monotonic()

    def done(self) -> None:
        """The output is there; nothing is to be gone on with."""
        self.path.unlink(missing_ok=True)
