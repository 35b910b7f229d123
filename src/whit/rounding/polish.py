"""Improving codes and scales that rounding has chosen, under the full quadratic loss; nothing here can raise it.

    coordinate descent   one code at a time to the level nearest to q_i - g_i / H_ii, where g = (q - w) H
    refit                with codes fixed, each outer span's float parameters by least squares, rounded to what is
                         stored, kept where the loss falls
    floor                per row the better of two candidates

All work is done on transposed matrices [cols, rows]. The row-wise loss is E = (q - w) H (q - w)^T.
Source: arXiv 2309.01885 (QuantEase), arXiv 2406.17542 (CDQuant), arXiv 2602.02126 (two-stage scales).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.codebook import Codebook
from whit.grids.grid import Adaptive, Params
from whit.grids.quantized import QuantizedTensor
from whit.grids.sparse import Sparse
from whit.rounding.curvature import Curvature
from whit.rounding.outliers import sparse_polish
from whit.rounding.steps import descend_span
from whit.rounding.tables import table_polish


def loss(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """(Q - W) H (Q - W)^T of every row, [rows] float32, for W and Q [rows, cols]."""
    delta = Q - W
    return torch.linalg.vecdot(delta @ H, delta)


def polish(
    W: Tensor, quantized: QuantizedTensor, grid: Adaptive | Codebook | Sparse, c: Curvature, sweeps: int
) -> QuantizedTensor:
    """Alternate refit and coordinate descent `sweeps` times, then refit; the loss of no row rises (of no matrix, where
    one table serves it).

    W  [rows, cols] float32
    """
    if isinstance(grid, Codebook):
        return table_polish(W, quantized, grid, c, sweeps)
    if isinstance(grid, Sparse):
        return sparse_polish(W, quantized, grid, c, sweeps)
    Wt, codes = W.T.contiguous(), quantized.codes.T.contiguous()  # [cols, rows]; codes [steps, rows]
    params: Params = quantized.params
    delta = quantized.dequantize().T - Wt
    params = _refit(delta, codes, params, grid, c.H)
    for _ in range(sweeps):
        if not _descend(delta, codes, params, grid, c.H):
            break
        params = _refit(delta, codes, params, grid, c.H)
    return QuantizedTensor(grid, quantized.shape, codes.T.contiguous(), dict(params))


@dataclass(frozen=True)
class Scored:
    """A rounded matrix and the loss of each of its rows, [rows] float32."""

    quantized: QuantizedTensor
    loss: Tensor


def scored(W: Tensor, quantized: QuantizedTensor, H: Tensor) -> Scored:
    """With its loss as W [rows, cols] rounded."""
    return Scored(quantized, loss(W, quantized.dequantize(), H))


def better_rows(first: Scored, second: Scored) -> Scored:
    """Row by row whichever of two candidates on one grid loses less; the first where they tie.

    Where rows share parameters one of the candidates wins as a whole.
    """
    if not first.quantized.grid.row_independent:
        return second if second.loss.sum() < first.loss.sum() else first
    second_wins = second.loss < first.loss  # [rows]
    if not second_wins.any():
        return first
    a, b, chosen = first.quantized, second.quantized, second_wins[:, None]
    params = {name: torch.where(chosen, b.params[name], value) for name, value in a.params.items()}
    codes = torch.where(chosen, b.codes, a.codes)
    least = torch.where(second_wins, second.loss, first.loss)
    return Scored(QuantizedTensor(a.grid, a.shape, codes, params), least)


def _descend(delta: Tensor, codes: Tensor, params: Params, grid: Adaptive, H: Tensor) -> bool:
    """One sweep over all columns; changes `codes` and `delta` [cols, rows] in place; whether any code changed."""
    cols = delta.shape[0]
    inner = grid.spans(cols)[-1]
    scales, _ = grid.effective(params)
    changed = False
    for n, first in enumerate(range(0, cols, inner)):
        changed |= descend_span(delta, codes, H, range(first, first + inner), grid, scales[:, n].contiguous())
    return changed


def _refit(delta: Tensor, codes: Tensor, params: Params, grid: Adaptive, H: Tensor) -> Params:
    """Float parameters of one outer span after the other, each by least squares given all others."""
    cols = delta.shape[0]
    outer = grid.spans(cols)[0]
    bases = {name: basis.T.contiguous() for name, basis in grid.bases(codes.T, params).items()}  # [cols, rows]
    names = list(bases)
    new = {name: value.clone() for name, value in params.items()}
    for n, a in enumerate(range(0, cols, outer)):
        span = slice(a, a + outer)
        gradient = H[span] @ delta  # [outer, rows]
        basis = [bases[name][span] for name in names]
        curved = [H[span, span] @ each for each in basis]
        slope = torch.stack([(each * gradient).sum(0) for each in basis])  # [n, rows]
        square = torch.stack([torch.stack([(x * y).sum(0) for y in curved]) for x in basis])  # [n, n, rows]
        old = torch.stack([new[name][:, n].float() for name in names])  # [n, rows]
        if old.shape[1] < slope.shape[1]:  # one for the whole matrix: the rows' losses are one
            slope, square = slope.sum(-1, keepdim=True), square.sum(-1, keepdim=True)
        dtypes = [new[name].dtype for name in names]
        for stored in _candidates(dtypes, old, slope, square):
            move = stored - old
            gain = 2 * (move * slope).sum(0) + (move[:, None] * square * move[None]).sum((0, 1))
            # relative margin: a gain below the precision of these sums is no gain
            better = gain < -1e-6 * (move[:, None] * square * move[None]).sum((0, 1))
            better &= torch.isfinite(gain)
            move = torch.where(better, move, 0.0)
            if not better.any():
                continue
            for k, name in enumerate(names):
                new[name][:, n] = torch.where(better, stored[k], old[k]).to(new[name].dtype)
                delta[span] += basis[k] * move[k]
            slope = slope + (square * move[None]).sum(1)
            old = torch.stack([new[name][:, n].float() for name in names])
    return new


def _candidates(dtypes: Sequence[torch.dtype], old: Tensor, slope: Tensor, square: Tensor) -> Iterator[Tensor]:
    """Parameters [n, rows] worth trying: the joint optimum, rounded to what is stored; then each alone."""

    def stored(values: Tensor) -> Tensor:
        limits = [torch.finfo(dtype) for dtype in dtypes]
        kept = [
            row.clamp(each.min, each.max).to(each_dtype).float()
            for row, each, each_dtype in zip(values, limits, dtypes, strict=True)
        ]
        return torch.where(torch.isfinite(values), torch.stack(kept), old)

    if len(dtypes) == 2:
        det = square[0, 0] * square[1, 1] - square[0, 1] ** 2
        safe = det > 1e-6 * square[0, 0] * square[1, 1]
        first = (square[1, 1] * slope[0] - square[0, 1] * slope[1]) / det
        second = (square[0, 0] * slope[1] - square[0, 1] * slope[0]) / det
        yield stored(torch.where(safe, old - torch.stack([first, second]), old))
    else:
        yield stored(torch.where(square[0] > 0, old - slope / square[0], old))
