"""What `train` is given, looked at before anything is changed, so that errors come in words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whit.errors import ModelError, TextError
from whit.live.quantize import twins_of
from whit.live.run import Call, logits_of, steady
from whit.tune.halves import fast


def check_windows(ids: Tensor) -> None:
    """Raise TextError for what is no windows of token ids, or none in which a token follows another."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise TextError(f"Windows are token ids [n, length] int64 in one tensor, found {found}.")
    if len(ids) < 1 or ids.shape[1] < 2:
        raise TextError(f"Windows of at least 2 tokens are needed, and one of them, found {list(ids.shape)}.")


def check_models(model: nn.Module, teacher: nn.Module | None, ids: Tensor) -> None:
    """Raise ModelError for a model that products in bfloat16 cannot be made of, and for a teacher that is none."""
    if any(value.dtype == torch.float64 for value in model.parameters()):
        raise ModelError("A model is trained in float32, bfloat16 or float16, found float64: call model.float() first.")
    if teacher is None:
        return
    if not set(twins_of(model)).isdisjoint(twins_of(teacher)):
        raise ModelError("The teacher is the quantized model itself: load the original once more and give that.")
    own, theirs = (_n_logits(each, ids[:1, :2]) for each in (model, teacher))
    if own != theirs:
        raise ModelError(
            f"The teacher's logits are of {theirs} tokens, those of the model of {own}: it can only follow a model of "
            "the same vocabulary."
        )


def _n_logits(model: nn.Module, ids: Tensor) -> int:
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad(), steady(model), fast(ids.device):
        return logits_of(model, Call((ids,), {})).shape[-1]
