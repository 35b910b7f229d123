"""Fisher information of weights: how much the model's predictions move when a weight does.

    F[r, c] = mean over windows of (d log p(y) / d W[r, c])^2,   y drawn from the model itself

1/2 sum F (Q - W)^2 is what the divergence of a window's predictions would be if errors of different weights did not add
up: the weights of SqueezeLLM's k-means. SqueezeLLM takes the text's own tokens as labels, whose squares are the Fisher
matrix only where the model is right about the text. A window's gradient is one product of what the sweep has anyway.
Source: arXiv 2306.07629, eq. 3 and 4; the sweep of sweep.py.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor

from whit.calibration.labels import STORED, batches
from whit.devices import CPU
from whit.models.model import Model
from whit.models.taps import Slot
from whit.pipeline.inputs import Inputs
from whit.pipeline.sweep import Gradients, Progress, Sweep
from whit.ranks import ALONE, Ranks


def fisher(
    model: Model,
    names: Collection[str],
    windows: Tensor,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Fisher information of every weight of some matrices: tensor name -> bfloat16 of the tensor's shape.

    Of more than MOST windows as many are taken, evenly spread; BATCH of them are swept at a time, because the hidden
    states of all blocks are in memory.

    names    GGUF names; those that no block holds (embeddings, head) are left out of the result
    windows  [n, length] int64
    seed     of the labels
    ranks    who sweeps a batch each; all of them have the result
    device   where this one runs the model
    """
    tell = progress or (lambda done, total, what: None)
    found: dict[str, Tensor] = {}
    chosen, kept = batches(len(windows)), dict[str, Tensor]()
    for n in range(len(chosen)):
        if n % ranks.size == 0 and n + ranks.rank < len(chosen):  # everyone's next before anyone's is waited for
            mine = n + ranks.rank
            sweep = Sweep(model, windows[chosen[mine]], seed + mine, tell, device)
            visitor = _Squares(sweep, frozenset(names), sum(map(len, chosen)))
            visitor.run()
            kept = visitor.fisher
        for name, part in ranks.given(kept, n % ranks.size).items():
            found[name] = part if name not in found else found[name] + part
    return found


class _Squares:
    def __init__(self, sweep: Sweep, wanted: frozenset[str], n_windows: int) -> None:
        """n_windows  in all batches"""
        self._sweep, self._wanted, self._n_windows = sweep, wanted, n_windows
        self.fisher: dict[str, Tensor] = {}

    def run(self) -> None:
        self._sweep.run(self)

    def names(self, there: list[str]) -> list[str]:
        return [name for name in there if name in self._wanted and len(self._sweep.tensors[name].shape) > 1]

    def arrives(self, x: Tensor) -> None:
        pass

    def predicts(self, p: Tensor) -> None:
        pass

    def rows(self, name: str, slot: Slot, outputs: Tensor, in_file: Tensor, scale: Tensor, share: int) -> _Rows:
        return _Rows(outputs, in_file, scale)

    def block(self, names: list[str], inputs: Inputs, gradients: Gradients) -> None:
        for name in names:
            shape, slots = self._sweep.tensors[name].shape, self._sweep.links.slots(name)
            whole = torch.zeros(shape, dtype=torch.float32)
            for k, slot in enumerate(slots):
                rows = cast(_Rows, gradients.of(name, slot))
                if rows.sum is not None:
                    (whole[k] if len(shape) == 3 else whole)[rows.in_file] = rows.sum.cpu()
            self.fisher[name] = (whole / self._n_windows).to(STORED)


class _Rows:
    """Sums over windows of squared gradients [rows, cols]."""

    def __init__(self, outputs: Tensor, in_file: Tensor, scale: Tensor) -> None:
        self._outputs, self.in_file, self._scale = outputs, in_file, scale
        self.sum: Tensor | None = None

    def add(self, gradient: Tensor, x: Tensor) -> None:
        here = gradient[:, self._outputs.to(gradient.device)] * self._scale.to(gradient.device)
        square = (here.T @ x).square()
        self.sum = square if self.sum is None else self.sum.add_(square)
