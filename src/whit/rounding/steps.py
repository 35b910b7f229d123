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
    back = pull[first:].T.contiguous()  # [columns, columns], row k holds what column k owes to the ones before it
    inverse, own = inverted(scale), errors[first:last]
    chosen = torch.empty_like(targets)  # levels
    rows = zip(
        targets.unbind(0), Wt[first:last].unbind(0), own.unbind(0), chosen.unbind(0), back.unbind(0), strict=True
    )
    # the calls on single columns are what this takes its time for: as few as can be
    for k, (target, w, error, level, weights) in enumerate(rows):
        if k:
            target.addmv_(own[:k].T, weights[:k])
        if offset is not None:
            target -= offset
        torch.mul(level.copy_(grid.levels.snap(target.mul_(inverse))), scale, out=target)
        if offset is not None:
            target += offset
        torch.sub(w, target, out=error)
    codes[first:last] = grid.levels.nearest(chosen)


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
    inverse, own = inverted(scale), slice(first, last)
    square = H[own, own] / -H.diagonal()[own, None]
    gradients = torch.mm(H[own] / -H.diagonal()[own, None], delta)  # [columns, rows], the step that each would take
    old = grid.levels.values(codes[own]).mul_(scale)
    changes = torch.empty_like(old)
    rows = zip(gradients.unbind(0), old.unbind(0), changes.unbind(0), square.unbind(0), strict=True)
    for k, (wanted, before, change, weights) in enumerate(rows):
        if k:
            wanted.addmv_(changes[:k].T, weights[:k])
        wanted += before  # less the offset, which cancels
        # the nearest level never raises the loss, except by a tie's rounding error
        torch.sub(grid.levels.snap(wanted.mul_(inverse)).mul_(scale), before, out=change)
    if not changes.any():
        return False
    delta[own] += changes
    codes[own] = grid.levels.nearest((old + changes) * inverse)
    return True


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
