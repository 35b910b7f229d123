"""One inner span of a matrix, step by step: the inner loops of error feedback and of coordinate descent.

Matrices are transposed, [cols, rows], so that a column is contiguous; codes are [steps, rows]. A step is one column on
scalar grids and several at once on lattices, where the choice is made under the metric of the step's own columns.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from whit.grids.grid import Adaptive, Scalar, Vector

CHUNK = 64  # columns between two matrix products when an inner span is wider


def round_span(
    Wt: Tensor,
    errors: Tensor,
    codes: Tensor,
    R: Tensor,
    span: range,
    grid: Adaptive,
    params: tuple[Tensor, Tensor | None],
) -> None:
    """Error feedback over one inner span; fills `codes` and `errors` = W - Q.

    Wt, errors  [cols, rows]
    R           [cols, cols] upper triangular, H = R R^T
    params      scale and offset [rows] of this span
    """
    scale, offset = params
    if grid.step > 1:
        _round_vectors(Wt, errors, codes, R, span, cast(Vector, grid), scale)
        return
    for first in range(span.start, span.stop, CHUNK):
        chunk = range(first, min(first + CHUNK, span.stop))
        _round_scalars(Wt, errors, codes, R, chunk, cast(Scalar, grid), scale, offset)


def descend_span(delta: Tensor, codes: Tensor, H: Tensor, span: range, grid: Adaptive, scale: Tensor) -> bool:
    """Coordinate descent over one inner span; changes `codes` and `delta` = Q - W; whether any code changed.

    delta  [cols, rows]
    scale  [rows] of this span; an offset plays no part, because codes are changed and not values
    """
    if grid.step > 1:
        return _descend_vectors(delta, codes, H, span, cast(Vector, grid), scale)
    changed = False
    for first in range(span.start, span.stop, CHUNK):
        chunk = range(first, min(first + CHUNK, span.stop))
        changed |= _descend_scalars(delta, codes, H, chunk, cast(Scalar, grid), scale)
    return changed


def inverted(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale of zero."""
    return torch.where(scale == 0, 0.0, 1.0 / scale).nan_to_num_(posinf=0.0, neginf=0.0)


def _round_scalars(
    Wt: Tensor,
    errors: Tensor,
    codes: Tensor,
    R: Tensor,
    span: range,
    grid: Scalar,
    scale: Tensor,
    offset: Tensor | None,
) -> None:
    first, last = span.start, span.stop
    pull = R[:last, first:last] / R.diagonal()[first:last]
    targets = torch.addmm(Wt[first:last], pull[:first].T, errors[:first])
    inverse = inverted(scale)
    for i in span:
        target = targets[i - first]
        if i > first:
            target = torch.addmv(target, errors[first:i].T, pull[first:i, i - first])
        x = target * inverse if offset is None else (target - offset).mul_(inverse)
        codes[i] = grid.levels.nearest(x)
        value = grid.levels.values(codes[i]).mul_(scale)
        if offset is not None:
            value += offset
        torch.sub(Wt[i], value, out=errors[i])


def _round_vectors(
    Wt: Tensor, errors: Tensor, codes: Tensor, R: Tensor, span: range, grid: Vector, scale: Tensor
) -> None:
    inverse = inverted(scale)[:, None]
    for a in range(span.start, span.stop, grid.step):
        b = a + grid.step
        own = R[a:b, a:b]
        pulled = torch.linalg.solve_triangular(own.T, R[:a, a:b].T @ errors[:a], upper=False)
        target = (Wt[a:b] + pulled).T  # [rows, step]
        code = grid.nearest_under(target * inverse, own @ own.T)
        codes[a // grid.step] = code
        errors[a:b] = Wt[a:b] - (grid.values(code) * scale[:, None]).T


def _descend_scalars(delta: Tensor, codes: Tensor, H: Tensor, span: range, grid: Scalar, scale: Tensor) -> bool:
    first, last = span.start, span.stop
    inverse = inverted(scale)
    gradient = H[first:last] @ delta  # [columns, rows]
    changed = False
    for i in span:
        k = i - first
        old = grid.levels.values(codes[i]).mul_(scale)
        wanted = torch.add(old, gradient[k], alpha=-1.0 / H[i, i].item())  # less the offset, which cancels
        code = grid.levels.nearest(wanted.mul_(inverse))
        change = grid.levels.values(code).mul_(scale).sub_(old)
        # the nearest level never raises the loss, except by a tie's rounding error
        codes[i] = code
        delta[i] += change
        if i + 1 < last:
            gradient[k + 1 :].addr_(H[i + 1 : last, i], change)
        changed = changed or bool(change.any())
    return changed


def _descend_vectors(delta: Tensor, codes: Tensor, H: Tensor, span: range, grid: Vector, scale: Tensor) -> bool:
    inverse = inverted(scale)[:, None]
    changed = False
    for a in range(span.start, span.stop, grid.step):
        b = a + grid.step
        P = H[a:b, a:b].contiguous()
        gradient = H[a:b] @ delta  # [step, rows]
        old_code = codes[a // grid.step]
        old = grid.values(old_code) * scale[:, None]  # [rows, step]
        wanted = old - torch.linalg.solve(P, gradient).T
        code = grid.nearest_under(wanted * inverse, P)
        change = grid.values(code) * scale[:, None] - old
        gain = torch.linalg.vecdot(change, change @ P + 2 * gradient.T)  # change of the loss
        better = (gain < 0) & (code != old_code)
        if better.any():
            changed = True
            codes[a // grid.step] = torch.where(better, code, old_code)
            delta[a:b] += torch.where(better[:, None], change, 0.0).T
    return changed
