"""The second moments of a model's inputs, gathered once and kept for any number of files that are rounded for them.

    FOLDER/run            the fingerprint of the model and the text
           windows        the text, so that nobody has to make it again
           block-00007    moments of everything that arrives in a block
           hidden-00008   what the next block is given, while they are gathered
           head           of what the head is given

They are of the original model: what a block is given depends on nothing that was rounded, so that one pass serves
every recipe. `whit quantize` gathers them on the quantized prefix instead, a pass for each file; docs/release.md says
what the difference costs. Sums are kept in float32, so a matrix of c inputs takes 4 c^2 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from whit.calibration.moments import Moments
from whit.checkpoints.atomic import synced_folder
from whit.checkpoints.checked import read_checked, write_checked
from whit.errors import BrokenFileError, OutputError
from whit.models.taps import Slot
from whit.pipeline.inputs import Inputs

HEAD, HIDDEN = "head", "hidden-"


class Statistics:
    """A folder of moments, complete or being filled.

    path  the folder
    """

    def __init__(self, path: Path) -> None:
        """Raises OutputError when the folder cannot be made."""
        self.path = path
        try:
            path.mkdir(exist_ok=True)
            synced_folder(path.parent)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error

    @property
    def n_blocks(self) -> int:
        """Blocks that are finished."""
        n = 0
        while (self.path / _block(n)).exists():
            n += 1
        return n

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be gathered."""
        return (self.path / HEAD).exists()

    @property
    def sound(self) -> list[str]:
        """Which pairs of matrices may be rescaled together, found on the first block. Raises BrokenFileError."""
        return list(self._read(_block(0))[0]["sound"])

    def keep(self, inputs: Inputs, sound: Sequence[str], hidden: Sequence[Tensor]) -> None:
        """The next block is finished.

        hidden  [1, length, hidden] per window: what the block after it is given
        Raises OutputError when it cannot be written; what was kept before is still there.
        """
        index = self.n_blocks
        write_checked(self.path / _hidden(index + 1), {}, {str(n): each for n, each in enumerate(hidden)})
        numbers: dict[int, int] = {}  # of moments, by identity
        said: dict[str, Any] = {"sound": sorted(sound), "slots": [], "counts": []}
        tensors: dict[str, Tensor] = {}
        for (name, expert), moments in inputs.moments.items():
            if id(moments) not in numbers:
                k = numbers[id(moments)] = len(numbers)
                counts, values = moments.saved()
                said["counts"].append(counts)
                tensors |= {f"{k}/{key}": value for key, value in values.items()}
            said["slots"].append([name, expert, numbers[id(moments)]])
        write_checked(self.path / _block(index), said, tensors)
        (self.path / _hidden(index)).unlink(missing_ok=True)

    def keep_head(self, moments: Moments) -> None:
        """All blocks are finished, and these are of what the head is given. Raises OutputError."""
        counts, tensors = moments.saved()
        write_checked(self.path / HEAD, {"counts": counts}, tensors)
        (self.path / _hidden(self.n_blocks)).unlink(missing_ok=True)

    def hidden(self) -> list[Tensor]:
        """What the first unfinished block is given. Raises BrokenFileError."""
        return list(self._read(_hidden(self.n_blocks))[1].values())

    def inputs(self, index: int, prefix: str) -> Inputs:
        """What arrives in a block. prefix: of its parameters' names. Raises BrokenFileError."""
        said, tensors = self._read(_block(index))
        moments = [Moments.of_saved(counts, _under(f"{k}/", tensors)) for k, counts in enumerate(said["counts"])]
        slots: dict[Slot, Moments] = {(name, expert): moments[k] for name, expert, k in said["slots"]}
        return Inputs.known(prefix, slots)

    def head(self) -> Moments:
        """Of what the head is given. Raises BrokenFileError."""
        said, tensors = self._read(HEAD)
        return Moments.of_saved(said["counts"], tensors)

    def _read(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            return read_checked(self.path / name)
        except BrokenFileError as error:
            raise BrokenFileError(f"{error} Delete the folder {self.path} to gather them anew.") from error


def _under(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def _block(index: int) -> str:
    return f"block-{index:05d}"


def _hidden(index: int) -> str:
    return f"{HIDDEN}{index:05d}"
