"""The state of a calibrated run, kept beside its output: a run that was stopped goes on, and ends with the same bytes.

    .OUT.quantizing/run         what must be the same for going on: the fingerprint
                    fisher      of all weights, where a rounding asks for it
                    block-00007 what the block's tensors were rounded to, and what the report says of them
                    hidden-00008  what the next block is given

A block is finished when its file is there. What the next block is given is written before it and what it was given
itself is removed after it, so that at every moment some block can be gone on from. Every file appears whole and synced.
Hidden states could be had again by running the finished blocks; that costs time that grows with every stop, and they
are small beside what a block takes to round.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.checkpoints.atomic import alone, synced_folder
from whit.checkpoints.checked import taken_checked, write_checked
from whit.errors import BrokenFileError, OutputError
from whit.grids.quantized import QuantizedTensor
from whit.models.model import Model
from whit.pipeline.effort import Calibration, TensorLoss
from whit.pipeline.plan import Piece, Step
from whit.pipeline.windows import Windows

RUN, FISHER = "run", "fisher"
CODES = "codes"
HIDDEN, ORIGINAL = "hidden", "original"


@dataclass
class Block:
    """What is kept of a finished block.

    pieces        of every tensor, by name, in the order in which they were rounded
    losses        of its matrices
    input_scales  fixed scales of what arrives at its tensors, where there are to be some
    sound         which pairs of the model may be rescaled, found on the first block
    """

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    losses: list[TensorLoss] = field(default_factory=list)
    input_scales: dict[str, float] = field(default_factory=dict)
    sound: list[str] = field(default_factory=list)


class State:
    """Where the state of one run lies.

    path      the folder, hidden beside the output
    n_blocks  how many blocks are finished
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, str]) -> None:
        """Find what an earlier run has left, or begin.

        fingerprint  what must be the same, by what a person calls it
        Raises OutputError when the state is of another run, BrokenFileError when it is damaged.
        """
        self.path = _place(out)
        self.n_blocks = 0
        if (self.path / RUN).exists():
            theirs, _ = self._read(RUN)
            other = [name for name, value in fingerprint.items() if theirs.get(name) != value]
            if other:
                raise OutputError(
                    f"{self.path} holds the unfinished work of a run with another {', '.join(other)}. Repeat the "
                    "command that it is of to go on there, or delete that folder to begin anew."
                )
            while (self.path / _block(self.n_blocks)).exists():
                self.n_blocks += 1
        else:
            try:
                self.path.mkdir(exist_ok=True)
                synced_folder(self.path.parent)
            except OSError as error:
                raise OutputError(f"{self.path}: cannot be written ({error.strerror or error}).") from error
            write_checked(self.path / RUN, fingerprint)

    def fisher(self) -> dict[str, Tensor] | None:
        """What `keep_fisher` kept, if it did. Raises BrokenFileError."""
        return self._read(FISHER)[1] if (self.path / FISHER).exists() else None

    def keep_fisher(self, found: Mapping[str, Tensor]) -> None:
        """Keep the Fisher information of all weights. Raises OutputError."""
        write_checked(self.path / FISHER, {}, found)

    def keep(self, block: Block, hidden: Windows, original: Windows) -> None:
        """Block number `n_blocks` is finished.

        hidden, original  [1, length, hidden] per window: what the next block is given, by the quantized prefix and by
                          the original model (or none)
        Raises OutputError when it cannot be written; what was kept before is still there.
        """
        index = self.n_blocks
        write_checked(self.path / _hidden(index + 1), {}, _Named({HIDDEN: hidden, ORIGINAL: original}))
        tensors: dict[str, Tensor] = {}
        shapes: list[tuple[str, list[tuple[int, int] | None]]] = []
        for name, pieces in block.pieces.items():
            shapes.append((name, [piece.shape if isinstance(piece, QuantizedTensor) else None for piece in pieces]))
            for k, piece in enumerate(pieces):
                values = {CODES: piece.codes, **piece.params} if isinstance(piece, QuantizedTensor) else {CODES: piece}
                tensors |= {f"{name}/{k}/{key}": value for key, value in values.items()}
        said = {"pieces": shapes, "losses": [vars(each) for each in block.losses]}
        said |= {"input_scales": block.input_scales, "sound": sorted(block.sound)}
        write_checked(self.path / _block(index), said, tensors)
        self.n_blocks += 1
        (self.path / _hidden(index)).unlink(missing_ok=True)

    def block(self, index: int, steps: Mapping[str, Step]) -> Block:
        """A finished block. steps: of its tensors. Raises BrokenFileError."""
        said, tensors = self._read(_block(index))
        pieces: dict[str, list[Piece]] = {}
        for name, shapes in said["pieces"]:
            pieces[name] = []
            for k, shape in enumerate(shapes):
                start = f"{name}/{k}/"
                values = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
                codes = values.pop(CODES)
                pieces[name].append(
                    codes if shape is None else QuantizedTensor(steps[name].grid, (shape[0], shape[1]), codes, values)
                )
        losses = [TensorLoss(**each) for each in said["losses"]]
        return Block(pieces, losses, said["input_scales"], said["sound"])

    def hidden(self, hidden: Windows, original: Windows) -> None:
        """Append what the first unfinished block is given, as `keep` was told. Raises BrokenFileError."""
        into = {HIDDEN: hidden, ORIGINAL: original}
        self._take(_hidden(self.n_blocks), lambda name, window: into[name.partition("/")[0]].append(window))

    def _read(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        return self._take(name, tensors.__setitem__), tensors

    def _take(self, name: str, take: Callable[[str, Tensor], None]) -> dict[str, Any]:
        try:
            return taken_checked(self.path / name, take)
        except BrokenFileError as error:
            raise _DamagedState(f"{error} Delete the folder {self.path} to begin anew.") from error


class _DamagedState(BrokenFileError):
    """What was kept is of no use."""


class _Named(Mapping[str, Tensor]):
    """Windows of several kinds with names, each read when it is asked for."""

    def __init__(self, windows: Mapping[str, Windows]) -> None:
        self._windows = windows

    def __iter__(self) -> Iterator[str]:
        return (f"{kind}/{n}" for kind, each in self._windows.items() for n in range(len(each)))

    def __len__(self) -> int:
        return sum(map(len, self._windows.values()))

    def __getitem__(self, name: str) -> Tensor:
        kind, n = name.split("/")
        return self._windows[kind][int(n)]


@contextmanager
def state_beside(
    out: Path, model: Model, steps: Sequence[Step], calibration: Calibration | None, activations: str = ""
) -> Iterator[State | None]:
    """The state of a run around the writing of `out`: it goes when that is whole; an error says what is kept.

    activations  the kind of folder, and how runtimes will quantize what arrives at layers
    None when no text is run through blocks: such a run keeps nothing. Raises what `State` raises.
    """
    known = calibration is None or calibration.importance is not None or calibration.statistics is not None
    if calibration is None or known or not any(step.needs_moments for step in steps):
        yield None
        return
    asked = fingerprint(model, steps, calibration, activations)
    with alone(_place(out), out, folder=True):
        state = State(out, asked)
        try:
            yield state
        except _DamagedState:
            raise
        except (OutputError, BrokenFileError) as error:  # nowhere to write to, or a source that can be read no more
            raise type(error)(
                f"{error} Finished blocks ({state.n_blocks}) are kept in {state.path}: the same command goes on there."
            ) from error
        shutil.rmtree(state.path)


def _place(out: Path) -> Path:
    return out.with_name(f".{out.name}.quantizing")


def fingerprint(model: Model, steps: Sequence[Step], calibration: Calibration, activations: str = "") -> dict[str, str]:
    """What a run depends on, by what a person calls it. Reads every weight once.

    activations  how runtimes will quantize what arrives at layers, as in a recipe
    """
    return {
        "version of Whit": version("whit"),
        "version of torch": str(torch.__version__),
        "model": _model(model),
        "recipe": _digest(json.dumps([activations, *([s.tensor.name, s.type, s.rounding] for s in steps)]).encode()),
        "text": _digest(repr(tuple(calibration.windows.shape)).encode(), calibration.windows.contiguous().numpy().data),
        "preset": repr((calibration.strength, calibration.effort)),
    }


def _model(model: Model) -> str:
    found = hashlib.sha256(json.dumps(dict(model.config), sort_keys=True, default=str).encode())
    source = model.tensors if model.gguf_tensors is None else model.gguf_tensors
    for name in source.names():
        info = source.info(name)
        found.update(repr((name, info.shape, info.dtype)).encode())
        values = source.read(name) if model.gguf_tensors is None else model.gguf_tensors.raw(name)
        found.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _digest(*parts: bytes | memoryview) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _block(index: int) -> str:
    return f"block-{index:05d}"


def _hidden(index: int) -> str:
    return f"hidden-{index:05d}"
