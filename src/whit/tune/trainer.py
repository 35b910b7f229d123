"""transformers' Trainer on a quantized model: one callback.

    quantize(model, weights=qint4)
    Trainer(model, arguments, train_dataset=data, callbacks=[QuantizedTraining()]).train()
    freeze(model)

Layers multiply with what a file would hold, and the Trainer's own optimizer moves offsets, scales and norms; its
rate of learning is in steps of the grid, and a relative change of scales. The Trainer resumes its checkpoints itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from whit.live.quantize import twins_of
from whit.tune.moving import FULL, RANK, learn, settle


class QuantizedTraining(TrainerCallback):
    """Lets a quantized model learn before the Trainer makes its optimizer, and settles it when training is over."""

    def __init__(self, train: str = FULL, rank: int = RANK) -> None:
        """train, rank  as `learn` takes them"""
        self._train, self._rank = train, rank

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Raises ModelError when nothing is quantized."""
        if model is not None and not any(each.learner is not None for each in twins_of(model)):
            learn(model, self._train, self._rank)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """What has been learned becomes codes and scales."""
        if model is not None:
            settle(model)
