"""Error feedback and polish for grids whose levels are a table of numbers: codes and levels choose each other.

    codes    column by column on the table of the row (or its group, or the matrix), the errors moved on as in
             feedback.py; then one at a time to the level nearest to q_i - g_i / H_ii, where g = (q - w) H
    levels   k-means to begin with, weighed by what an error costs once all later columns have adapted (R_ii^2), or by
             that and how much each weight matters to the model (Fisher information); then, with codes fixed, the
             minimum of the whole quadratic loss: (P^T H P) c = P^T H w, with P the codes as one-hot rows

The system of a table has as many unknowns as levels and is solved by conjugate gradients on the loss itself: a step
costs one product with H for all rows, whatever the number of levels, levels that no code stands for stay where they
are, and tables of rows, groups or the matrix are one case. Levels are kept where the loss falls once they are in half
precision, so that nothing here can raise it.
Source: arXiv 2505.07004 (GuidedQuant: the alternation, called LNQ), arXiv 2306.07629; docs/quantizers.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.grids.codebook import Codebook, middles
from whit.grids.grid import Params
from whit.grids.quantized import QuantizedTensor
from whit.rounding.curvature import Curvature
from whit.rounding.steps import CHUNK

STEPS = 20  # of conjugate gradients at most: with n levels a row is exact after n
WORTH = 1e-6  # of the loss: less is rounding noise


def table_feedback(
    W: Tensor, grid: Codebook, c: Curvature, importance: Tensor | None = None, levels: Params | None = None
) -> QuantizedTensor:
    """Codes and levels of W [rows, cols] float32 under the curvature of its inputs.

    importance  [rows, cols] non-negative, how much each weight matters beside H; None for all alike
    levels      stored ones to round to; None to find them on the targets, span by span
    Raises ValueError when cols does not fit the grid, OverflowError when a level leaves half precision.
    """
    rows, cols = W.shape
    grid.schema((rows, cols))  # divisibility
    span = grid.spans(cols)[0]
    weights = c.R.diagonal().square()
    if importance is not None:
        weights = _relative(importance, c.H.diagonal()) * weights
    pull = c.R / c.R.diagonal()  # column i divided by R_ii
    Wt = W.T.contiguous()
    errors = torch.zeros_like(Wt)  # w - q of the columns that are done
    codes = torch.empty(cols, rows, dtype=torch.uint8)
    given = None if levels is None else grid.tables(levels, rows)
    found: list[Tensor] = []
    for n, a in enumerate(range(0, cols, span)):
        b = a + span
        if given is None:
            target = (Wt[a:b] + pull[:a, a:b].T @ errors[:a]).T.contiguous()
            found.append(grid.search(target, weights[..., a:b])["levels"])
            table = grid.tables({"levels": found[-1]}, rows)[:, 0]
        else:
            table = given[:, n]
        for first in range(a, b, CHUNK):
            _round_columns(Wt, errors, codes, c.R, range(first, min(first + CHUNK, b)), table.contiguous())
    stored = levels if levels is not None else {"levels": torch.cat(found, dim=1)}
    return QuantizedTensor(grid, (rows, cols), codes.T.contiguous(), stored)


def table_polish(W: Tensor, quantized: QuantizedTensor, grid: Codebook, c: Curvature, sweeps: int) -> QuantizedTensor:
    """Alternate refit and coordinate descent `sweeps` times, then refit; no row (no matrix, with one table) gets worse.

    W  [rows, cols] float32
    """
    found = refit(W, quantized, grid, c)
    for _ in range(sweeps):
        descended = _descend(W, found, grid, c.H)
        if descended is None:
            break
        found = refit(W, descended, grid, c)
    return found


def refit(W: Tensor, quantized: QuantizedTensor, grid: Codebook, c: Curvature) -> QuantizedTensor:
    """The same codes on the levels of least loss under H, ascending again; as it was where that does not help.

    W  [rows, cols] float32
    """
    index = grid.index(quantized.codes)  # [tables, codes of them]; a row's groups are one system
    old = quantized.params["levels"].float()
    best = _solved(W, index, old, c.H)
    # crossing levels change places, and so do their codes: values stay what they are
    blocks, order = best.view(-1, grid.n_levels).sort(1)
    rank = order.argsort(1).view(best.shape).to(torch.uint8)
    codes = rank.gather(1, index).view(W.shape)
    limit = torch.finfo(torch.float16).max
    levels = blocks.view(best.shape).clamp(-limit, limit).to(torch.float16)
    new = QuantizedTensor(grid, quantized.shape, codes, {"levels": levels})
    before, after = (_losses(W, each, c.H, old.shape[0]) for each in (quantized, new))
    better = (after < before * (1 - WORTH))[:, None]  # [tables, 1]
    codes = torch.where(better, codes.view(old.shape[0], -1), quantized.codes.view(old.shape[0], -1)).view(W.shape)
    levels = torch.where(better, levels, quantized.params["levels"])
    return QuantizedTensor(grid, quantized.shape, codes, {"levels": levels})


def _solved(W: Tensor, index: Tensor, start: Tensor, H: Tensor) -> Tensor:
    """Levels [tables, n] near the minimum of the loss at these codes, by conjugate gradients.

    The preconditioner is what the diagonal of H alone would make of P^T H P.
    """
    tables = start.shape[0]

    def spread(levels: Tensor) -> Tensor:
        return levels.gather(1, index).view(W.shape)

    def gathered(values: Tensor) -> Tensor:
        return torch.zeros_like(start).scatter_add_(1, index, values.reshape(tables, -1))

    levels = start.clone()
    inverse = gathered(H.diagonal().expand(W.shape))
    inverse = torch.where(inverse > 0, 1 / inverse, 0.0)
    residual = -gathered((spread(levels) - W) @ H)
    direction = residual * inverse
    along = (residual * direction).sum(1, keepdim=True)
    for _ in range(min(STEPS, start.shape[1])):
        curved = gathered(spread(direction) @ H)
        length = along / (direction * curved).sum(1, keepdim=True)
        length = length.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        levels += length * direction
        residual -= length * curved
        scaled = residual * inverse
        following = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + (following / along).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) * direction
        along = following
    return levels


def _losses(W: Tensor, quantized: QuantizedTensor, H: Tensor, tables: int) -> Tensor:
    """[tables], of all rows that a table serves."""
    delta = quantized.dequantize() - W
    return torch.linalg.vecdot(delta @ H, delta).double().view(tables, -1).sum(1)


def _relative(importance: Tensor, diagonal: Tensor) -> Tensor:
    """What a weight matters beyond its column's second moment, mean one in every row; a row of zeros counts evenly."""
    found = importance / diagonal.clamp(min=torch.finfo(torch.float32).tiny)
    mean = found.mean(1, keepdim=True)
    return torch.where(mean > 0, found / mean, 1.0)


def _round_columns(Wt: Tensor, errors: Tensor, codes: Tensor, R: Tensor, span: range, table: Tensor) -> None:
    """Feedback over some columns; fills `codes` [cols, rows] and `errors` = W - Q.

    table  [rows, levels]
    """
    first, last = span.start, span.stop
    pull = R[:last, first:last] / R.diagonal()[first:last]
    targets = torch.addmm(Wt[first:last], pull[:first].T, errors[:first])
    back = pull[first:].T.contiguous()  # [columns, columns], row k holds what column k owes to the ones before it
    between, own = middles(table), errors[first:last]
    for k in range(last - first):
        target = targets[k]
        if k:
            target.addmv_(own[:k].T, back[k, :k])
        code = torch.searchsorted(between, target[:, None])
        torch.sub(Wt[first + k], table.gather(1, code)[:, 0], out=own[k])
        codes[first + k] = code[:, 0]


def _descend(W: Tensor, quantized: QuantizedTensor, grid: Codebook, H: Tensor) -> QuantizedTensor | None:
    """One sweep over all columns, each code to the level that is best as the others are; None when none changed."""
    rows, cols = W.shape
    tables, span = grid.tables(quantized.params, rows), grid.spans(cols)[0]
    delta = (quantized.dequantize() - W).T.contiguous()  # [cols, rows]
    codes = quantized.codes.T.contiguous()
    changed = False
    for n, a in enumerate(range(0, cols, span)):
        table = tables[:, n].contiguous()
        between = middles(table)
        for first in range(a, a + span, CHUNK):
            own = slice(first, min(first + CHUNK, a + span))
            step = -1 / H.diagonal()[own, None]
            wanted = torch.mm(H[own] * step, delta)  # [columns, rows], the step that each would take
            square, changes = H[own, own] * step, torch.empty_like(wanted)
            for k in range(wanted.shape[0]):
                if k:
                    wanted[k].addmv_(changes[:k].T, square[k, :k])
                before = table.gather(1, codes[first + k, :, None].long())
                code = torch.searchsorted(between, wanted[k][:, None] + before)
                torch.sub(table.gather(1, code)[:, 0], before[:, 0], out=changes[k])
                codes[first + k] = code[:, 0]
            changed |= bool(changes.any())
            delta[own] += changes
    return QuantizedTensor(grid, (rows, cols), codes.T.contiguous(), quantized.params) if changed else None
