"""transformers' Trainer on a quantized model: one callback.

    quantize(model, weights=qint4)
    Trainer(model, arguments, train_dataset=data, callbacks=[QuantizedTraining(teacher=original)]).train()
    freeze(model)

Layers multiply with what a file would hold, and the Trainer's own optimizer moves offsets, scales and norms; its
rate of learning is in steps of the grid, and a relative change of scales. The Trainer resumes its checkpoints itself.

A teacher's divergence takes the place of the loss that the model returns with its logits, which the Trainer trains and
evaluates with: a callback has no other way to the loss, and this one leaves the Trainer's class to its user.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from whit.errors import ModelError, RecipeError
from whit.live.quantize import twins_of
from whit.tune.losses import divergence
from whit.tune.moving import FULL, RANK, learn, settle

IGNORED = -100  # transformers' label of a token that is not to be learned


class QuantizedTraining(TrainerCallback):
    """Lets a quantized model learn before the Trainer makes its optimizer, and settles it when training is over."""

    def __init__(
        self, train: str = FULL, rank: int = RANK, teacher: nn.Module | None = None, next_token: float = 0.0
    ) -> None:
        """What moves, and towards what.

        train, rank  as `learn` takes them
        teacher      the float model to follow, with the same vocabulary; it is moved to the Trainer's device and set to
                     eval. The loss, in evaluation too, is (1 - next_token) KL(teacher || model) + next_token * (the
                     model's own loss), over the tokens whose labels count. None for the model's own loss.
        next_token   0 to 1
        Raises RecipeError for a share that is none.
        """
        if not 0 <= next_token <= 1:
            raise RecipeError(f"next_token is the share of the model's own loss, from 0 to 1, found {next_token}.")
        self._train, self._rank, self._teacher, self._share = train, rank, teacher, next_token
        self._hook: RemovableHandle | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Raises ModelError when nothing is quantized, or the teacher is."""
        if self._teacher is not None:
            if self._teacher is model or any(True for _ in twins_of(self._teacher)):
                raise ModelError("The teacher is quantized itself: load the original once more and give that.")
            if args.label_smoothing_factor:
                raise RecipeError(
                    "Smoothed labels replace the loss that a teacher gives: leave label_smoothing_factor."
                )
        if model is not None and not any(each.learner is not None for each in twins_of(model)):
            learn(model, self._train, self._rank)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """From now on the model's loss is the divergence from the teacher.

        Raises ModelError when nothing learns any more: the Trainer's optimizer, which is made before this, would move
        what the model no longer has.
        """
        self._let_go()
        if model is not None and not any(each.learner is not None for each in twins_of(model)):
            raise ModelError(
                "This model's training is over: its codes and scales are settled. Make a new Trainer, with a new "
                "QuantizedTraining, to train it further."
            )
        if model is not None and self._teacher is not None:
            teacher = self._teacher.to(args.device).eval()
            self._hook = model.register_forward_hook(_Follow(teacher, self._share, _cast(args)), with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """What has been learned becomes codes and scales, and the model's loss its own again."""
        self._let_go()
        if model is not None:
            settle(model)

    def _let_go(self) -> None:
        """A training that was interrupted leaves its hook behind."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class _Follow:
    """A hook behind a causal model, as the Trainer calls it: the loss among its outputs becomes another one."""

    def __init__(self, teacher: nn.Module, share: float, dtype: torch.dtype | None) -> None:
        """dtype  of the teacher's products; None for that of its weights"""
        self._teacher, self._share, self._dtype = teacher, share, dtype

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """Outputs without labels are left alone. Raises ModelError when the logits are no teacher's."""
        labels = kwargs.get("labels")
        if labels is None:
            return out
        logits, count = getattr(out, "logits", None), kwargs.get("num_items_in_batch")
        if logits is None:
            raise ModelError("The model returns no logits to compare with a teacher's: leave use_liger_kernel out.")
        inputs = {key: each for key, each in kwargs.items() if key not in ("labels", "num_items_in_batch")}
        with torch.no_grad(), torch.autocast(logits.device.type, self._dtype, enabled=self._dtype is not None):
            wanted = cast(Tensor, self._teacher(*args, **inputs)["logits"])
        if wanted.shape != logits.shape:
            raise ModelError(
                f"The teacher's logits are {list(wanted.shape)}, those of the model {list(logits.shape)}: it can only "
                "follow a model of the same vocabulary."
            )
        if "shift_labels" in kwargs:
            counts = kwargs["shift_labels"] != IGNORED
        else:
            counts = torch.zeros_like(labels, dtype=torch.bool)
            counts[:, :-1] = labels[:, 1:] != IGNORED
        # One mean over all the tokens of a step, whatever its number of calls, as transformers' own losses take it.
        n = counts.sum().clamp(min=1) if count is None else count
        loss = (1 - self._share) * divergence(logits[counts], wanted[counts]) / n
        out["loss"] = loss if self._share == 0 else loss + self._share * out["loss"]
        return out


def _cast(args: Any) -> torch.dtype | None:
    """What the Trainer casts products to."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
