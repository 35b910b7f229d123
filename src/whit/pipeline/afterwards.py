"""A short look at a file that has just been written: are its codes the intended ones, and what was lost?

While a file is written, every matrix leaves a sketch: each row's product with one fixed vector, which any wrong, lost
or misplaced code changes. The file is then opened again, read by the second decoder, and sketched once more. A few
windows of held-out text say what was lost, where that is a matter of a minute and fits in memory; `whit verify` says
more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from whit.allocator import return_memory
from whit.calibration.text import default_text, first_windows
from whit.checkpoints.second import SecondGGUF
from whit.devices import CPU
from whit.errors import WhitError
from whit.evaluation.divergence import Comparison
from whit.evaluation.verdict import Verdict, verdict
from whit.grids.quantized import QuantizedTensor
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.damage import decoded
from whit.pipeline.forecast import verdict_bytes
from whit.pipeline.quantize import Progress, model_view

MOST_WINDOWS = 2
MOST_WORK = 4e12  # multiplications and additions for both models: about a minute on two cores
ROOM = 1.5  # times a model's float32 weights, for what else is in memory
ALIKE = 1e-4  # of a row's size


class Intended:
    """Sketches of what was meant to be written, by tensor (or weight of a folder)."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, piece: QuantizedTensor) -> None:
        """Some rows of a matrix, in order."""
        self._rows.setdefault(name, []).append(_sketch(piece.dequantize()))

    def __len__(self) -> int:
        return len(self._rows)

    def differing(self, read: Model) -> list[str]:
        """The names of those that a model's file holds otherwise."""
        found = []
        for name, pieces in self._rows.items():
            if read.gguf_tensors is not None:
                W = SecondGGUF(read.gguf_tensors).read(name)
                sides = [W.reshape(-1, W.shape[-1])]
            else:
                W = read.tensors.read(name).float()
                sides = [W, W.T]  # transformers' Conv1D has weights on their sides
            expected = torch.cat(pieces)
            if not any(_same(side, expected) for side in sides):
                found.append(name)
        return found


@dataclass(frozen=True)
class Look:
    """What was found.

    verdict      None when nothing was measured and nothing is wrong
    result       on a few windows, None when it was not measured
    unmeasured   why not
    compared     tensors whose values were compared with the intended ones
    """

    verdict: Verdict | None
    result: Comparison | None
    unmeasured: str
    compared: int
    faults: tuple[str, ...] = ()


def look(
    path: Path,
    original: Model,
    length: int,
    intended: Intended,
    progress: Progress | None = None,
    ram: int | None = None,
    device: torch.device = CPU,
) -> Look:
    """Open what was written again and compare it with what was intended and with the original.

    length  tokens that the original reads at once
    ram     bytes that the process may take, None for what there is
    device  where both models run
    Raises nothing of its own: a file that cannot be read is a fault.
    """
    return_memory()  # of what rounding has freed, which would come on top of the models
    try:
        read = decoded(open_model(path)).model
        wrong = intended.differing(read)
    except WhitError as error:
        return Look(verdict(None, (), str(error)), None, "", 0, (str(error),))
    return_memory()
    faults: tuple[str, ...] = ()
    if wrong:
        faults = (f"{len(wrong)} of {len(intended)} tensors are not what was to be written ({wrong[0]})",)
    n_windows, reason = affordable(original, length, ram)
    result = None
    if n_windows:
        from whit.evaluation.compare import compare  # it imports transformers, which takes seconds
        from whit.models.tokenizer import load_tokenizer

        try:
            windows = first_windows(default_text(), load_tokenizer(original).encode, length, n_windows)
            result = compare(read, original, windows, progress, device)
        except WhitError as error:
            reason = str(error)
    found = verdict(result, faults) if faults or result is not None else None
    return Look(found, result, reason, len(intended), faults)


def affordable(original: Model, length: int, ram: int | None = None) -> tuple[int, str]:
    """Windows that can be measured in about a minute and in the memory there is, and why there are none.

    ram  bytes that the process may take, None for what there is
    """
    each = [tensor.n_weights for tensor in model_view(original).tensors]
    if ram is not None and (all_of_it := verdict_bytes(each)) > ram:
        return 0, f"the two models take {all_of_it / 1e6:,.0f} MB of memory to run, --ram allows {ram / 1e6:,.0f} MB"
    n_weights = sum(each)
    needed, free = ROOM * 4 * n_weights, psutil.virtual_memory().available
    if needed > free:
        return 0, f"the original takes {needed / 1e9:.1f} GB of memory to run, {free / 1e9:.1f} GB are free"
    n = int(MOST_WORK / (4 * n_weights * length))
    if n < 1:
        return 0, f"running {n_weights / 1e9:.1f} billion weights twice takes longer than a minute"
    return min(n, MOST_WINDOWS), ""


def _same(W: Tensor, expected: Tensor) -> bool:
    if W.shape[0] != expected.numel():
        return False
    return bool(((_sketch(W) - expected).abs() <= ALIKE * W.norm(dim=1) + 1e-12).all())


def _sketch(W: Tensor) -> Tensor:
    """[rows] of W [rows, cols]: no two columns have the same factor."""
    return W @ (torch.arange(W.shape[1]) * 1.7).cos()
