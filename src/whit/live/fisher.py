"""Fisher information of a live model's weights, as pipeline/fisher.py finds it for files: the whole model is in memory.

    F[r, c] = mean over windows of (d log p(y) / d W[r, c])^2,   y drawn from the model itself

A window is a call of token ids, or every row of one. autograd gives a window's gradient by the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from whit.calibration.labels import STORED, batches, pieces, towards
from whit.live.run import Call, logits_of, steady, unrounded
from whit.live.twin import Twin

Progress = Callable[[int, int, str], None]


def fisher(
    model: nn.Module, twins: Mapping[str, Twin], calls: Sequence[Call], progress: Progress, seed: int = 0
) -> dict[str, Tensor]:
    """Fisher information of the matrices [rows, cols] of some unfrozen twins by name, bfloat16.

    calls  the text; padding (an attention_mask of 0) predicts nothing
    seed   of the labels
    All gradients of a window are in memory together. Raises ModelError when the model returns no logits.
    """
    homes = {name: parameter for name, each in twins.items() if (parameter := each._parameters["weight"]) is not None}
    windows = [one for call in calls for one in _rows(call)]
    sums = {name: torch.zeros_like(each, dtype=torch.float32) for name, each in homes.items()}
    chosen = batches(len(windows))
    done, total = 0, sum(map(len, chosen))
    wanted = [(each, each.requires_grad) for each in homes.values()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(True)
        with unrounded(model), steady(model):
            for n, batch in enumerate(chosen):
                generator = torch.Generator(_device(model)).manual_seed(seed + n)
                for index in batch:
                    progress(done, total, "how much each weight matters")
                    _add(model, windows[index], homes, sums, generator)
                    done += 1
    finally:
        for parameter, was in wanted:
            parameter.requires_grad_(was)
    return {name: ((each.T if twins[name].turned else each) / total).to(STORED) for name, each in sums.items()}


def _add(
    model: nn.Module,
    window: Call,
    homes: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    generator: torch.Generator,
) -> None:
    """Squares of one window's gradients."""
    with torch.enable_grad():
        logits = logits_of(model, window)
    flat = logits.detach().float().flatten(0, -2)
    away = torch.cat([towards(flat[part].softmax(-1), generator) for part in pieces(*flat.shape)])
    mask = window.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.numel() == len(away):
        away *= mask.reshape(-1, 1)
    gradients = torch.autograd.grad(
        logits, list(homes.values()), away.view(logits.shape).to(logits.dtype), allow_unused=True
    )
    for name, gradient in zip(homes, gradients, strict=True):
        if gradient is not None:  # an expert that no token reached has none
            sums[name].add_(gradient.float().square())


def _rows(call: Call) -> list[Call]:
    """Calls of one row each where a call has token ids of several."""
    tensors = [each for each in (*call.args, *call.kwargs.values()) if isinstance(each, Tensor)]
    shapes = {each.shape[:1] for each in tensors}
    if not tensors or tensors[0].dim() != 2 or tensors[0].is_floating_point() or len(shapes) != 1:
        return [call]

    def part(each: object, n: int) -> object:
        return each[n : n + 1] if isinstance(each, Tensor) else each

    return [
        Call(tuple(part(each, n) for each in call.args), {key: part(each, n) for key, each in call.kwargs.items()})
        for n in range(len(tensors[0]))
    ]


def _device(model: nn.Module) -> torch.device:
    return next(each.device for each in model.parameters())
