"""The float model that a quantized one follows: its predictions on windows that are read once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from whit.tune.blocks import Blocks
from whit.tune.halves import Halves, fast

Progress = Callable[[int, int, str], None]


class Teacher:
    """The float model's predictions, from final hidden states that are found once.

    model  the float model, until `rest`
    """

    def __init__(self, model: nn.Module, ids: Tensor, n_held: int) -> None:
        """ids     [windows, length] int64, all windows that will be asked for
        n_held  how many of them can be asked for before `read`
        """
        self.model: nn.Module | None = model
        self._halves, self._ids = Halves(model), ids
        self._states = [self._state(n) for n in range(n_held)]

    def __call__(self, window: int, part: slice) -> Tensor:
        """Logits [n, vocab] of some tokens."""
        with torch.no_grad(), fast(self._ids.device):
            return self._halves.logits(self._states[window][part])

    def read(self, blocks: Blocks | None, progress: Progress) -> None:
        """All other windows; from where blocks have come to, once all have been gone through.

        After this the decoder may go, unless somebody else holds it.
        """
        if blocks is not None and not self._agrees(blocks):
            blocks = None
        for n in range(len(self._states), len(self._ids)):
            progress(n, len(self._ids), "reading with the original")
            self._states.append(self._state(n, blocks))
        self.model = None
        self._halves.only_logits()

    def _state(self, n: int, blocks: Blocks | None = None) -> Tensor:
        """[length, width] of a window."""
        ids = self._ids[n][None]
        with torch.no_grad(), fast(ids.device):
            if blocks is None:
                return self._halves.hidden(ids)
            return blocks.finished(n, lambda: self._halves.hidden(ids))

    def _agrees(self, blocks: Blocks) -> bool:
        """Whether the last block's hidden states are all that the rest of the model looks at."""
        if not self._states:
            return False
        expected = self._states[0]
        return bool((self._state(0, blocks) - expected).norm() <= 0.05 * expected.norm())  # bfloat16, other batches
