"""What is made small: the divergence from a teacher, or the surprise at the next token; with gradients, in pieces.

    distillation   mean over tokens of KL(teacher || student), whole vocabulary, nats
    next token     mean over tokens of -log p(next)

The gradient by logits is known in closed form, softmax(student) less softmax(teacher) or less the token itself, so that
no graph of the loss is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from whit.tune.halves import PIECE, Halves

Wanted = Callable[[int, slice], Tensor]  # which window, which of its tokens -> teacher's logits [n, vocab]


def losses(student: Halves, hidden: Tensor, windows: Sequence[int], ids: Tensor, teacher: Wanted | None) -> Tensor:
    """[tokens] float64, the loss of every token (the last of a window is left out where there is no next one).

    hidden   [windows * length, width] as Halves.hidden gives it
    windows  numbers of the windows, for the teacher
    ids      [windows, length] int64
    """
    found = []
    with torch.no_grad():
        for n, part in _pieces(ids, teacher is None):
            logits = student.logits(hidden[_rows(n, part, ids)])
            found.append(_measured(logits, windows[n], part, ids[n], teacher)[0])
    return torch.cat(found).double()


def backward(
    student: Halves, hidden: Tensor, windows: Sequence[int], ids: Tensor, teacher: Wanted | None, share: float = 1.0
) -> float:
    """Add the gradients of the mean over tokens of the loss, times `share`.

    Arguments as for `losses`; hidden has a graph. Returns the mean loss, not multiplied.
    """
    whole = hidden.detach()
    G = torch.zeros_like(whole)
    total, parts = 0.0, list(_pieces(ids, teacher is None))
    n_tokens = sum(part.stop - part.start for _, part in parts)
    for n, part in parts:
        rows = _rows(n, part, ids)
        at = whole[rows].requires_grad_()
        with torch.enable_grad():
            logits = student.logits(at)
        loss, off = _measured(logits.detach(), windows[n], part, ids[n], teacher)
        total += loss.sum().item()
        off.mul_(share / n_tokens)
        if logits.requires_grad:
            torch.autograd.backward(logits, off.to(logits.dtype))
        assert at.grad is not None
        G[rows] = at.grad
    hidden.backward(G)
    return total / n_tokens


def _measured(logits: Tensor, window: int, part: slice, ids: Tensor, teacher: Wanted | None) -> tuple[Tensor, Tensor]:
    """Of some tokens of one window: the loss [n], and the gradient [n, vocab] of its sum by the logits."""
    log_q = logits.log_softmax(-1, dtype=torch.float32)
    if teacher is None:
        following = ids[part.start + 1 : part.stop + 1, None]
        loss = -log_q.gather(1, following)[:, 0]
        return loss, log_q.exp_().scatter_add_(1, following, torch.full_like(loss, -1.0)[:, None])
    return _divergence(log_q, teacher(window, part))


def _divergence(log_q: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(wanted) || q) [n], and the gradient [n, vocab] of its sum by the logits of q; log_q is overwritten."""
    log_p = wanted.log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum(-1)
    return loss, log_q.exp_().sub_(p)


class _Divergence(torch.autograd.Function):
    """The sum over rows; all that is kept for the way back is the gradient, in the dtype of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        found, total = torch.empty_like(logits), torch.zeros((), device=logits.device)
        for at in range(0, len(logits), PIECE):
            part = slice(at, at + PIECE)
            loss, off = _divergence(logits[part].log_softmax(-1, dtype=torch.float32), wanted[part])
            found[part] = off
            total += loss.sum()
        ctx.save_for_backward(found)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (found,) = ctx.saved_tensors
        return found * gradients[0].to(found.dtype), None


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sum over rows of KL(softmax(wanted) || softmax(logits)), float32, nats; differentiable by logits.

    logits, wanted  [n, vocab]
    """
    return cast(Tensor, _Divergence.apply(logits, wanted))


def _pieces(ids: Tensor, next_token: bool) -> list[tuple[int, slice]]:
    """Which window, which of its tokens."""
    length = ids.shape[1] - next_token
    return [(n, slice(at, min(at + PIECE, length))) for n in range(len(ids)) for at in range(0, length, PIECE)]


def _rows(n: int, part: slice, ids: Tensor) -> slice:
    return slice(n * ids.shape[1] + part.start, n * ids.shape[1] + part.stop)
