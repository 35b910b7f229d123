"""Rounding with error feedback: each column answers for the errors of the columns before it.

    target_i = w_i + sum_{j<i} (w_j - q_j) R_ji / R_ii        q_i = nearest level to target_i

The loss becomes sum_i R_ii^2 (q_i - target_i)^2, so R_ii^2 is the weight with which scales are searched, on the
targets and not on the weights: a block's parameters are chosen when its turn comes, and those of inner spans
later still. Published error feedback on these formats chose scales without looking at activations and lost to
weighted rounding without feedback; the two belong together.

All work is done on transposed matrices [cols, rows], in which a column is contiguous.
Source: arXiv 2210.17323 (GPTQ), pull form as in docs/rounding.md.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from whit.grids.codebook import Codebook
from whit.grids.grid import Adaptive, Grid, Params
from whit.grids.quantized import QuantizedTensor
from whit.grids.sparse import Sparse
from whit.rounding.curvature import Curvature
from whit.rounding.outliers import sparse_feedback
from whit.rounding.steps import round_span
from whit.rounding.tables import table_feedback

Scales = Literal["search", "range"]


def adapts(grid: Grid) -> bool:
    """Whether error feedback works on a grid."""
    return isinstance(grid, Codebook | Sparse) or hasattr(grid, "bases")


def feedback(
    W: Tensor, grid: Adaptive | Codebook | Sparse, c: Curvature, late: bool = True, scales: Scales = "search"
) -> QuantizedTensor:
    """Codes and parameters of W [rows, cols] float32 under the curvature of its inputs.

    late    choose the parameters of inner spans on targets that carry the errors of the spans before them
    scales  "search" weighs errors on the compensated target; "range" takes the range rule on W itself, as GPTQ does,
            and on a codebook the levels of W itself
    Raises ValueError when cols does not fit the grid, OverflowError when a scale leaves its dtype.
    """
    if isinstance(grid, Codebook):
        return table_feedback(W, grid, c, levels=grid.store(grid.fit(W)) if scales == "range" else None)
    if isinstance(grid, Sparse):
        return sparse_feedback(W, grid, c, given=scales == "range")
    rows, cols = W.shape
    R, late = c.R, late and scales == "search"
    weights = R.diagonal().square()
    pull = R / R.diagonal()  # column i divided by R_ii
    outer, *_, inner = (*grid.spans(cols), grid.spans(cols)[-1])
    Wt = W.T.contiguous()
    errors = torch.zeros_like(Wt)  # w - q of the columns that are done
    codes = torch.empty(cols // grid.step, rows, dtype=grid.code_spec((rows, cols)).dtype)
    found: list[Params] = []
    for a in range(0, cols, outer):
        b = a + outer
        if scales == "range":
            params = grid.store(grid.fit(W[:, a:b]))
        else:
            params = searched(Wt[a:b] + pull[:a, a:b].T @ errors[:a], grid, weights[a:b])
        for j, start in enumerate(range(a, b, inner)):
            stop = start + inner
            if late and inner < outer:
                target = Wt[start:stop] + pull[:start, start:stop].T @ errors[:start]
                params = grid.late(target.T.contiguous(), weights[start:stop], params, j)
            scale, offset = (None if value is None else value[:, j].contiguous() for value in grid.effective(params))
            round_span(Wt, errors, codes, R, range(start, stop), grid, (cast(Tensor, scale), offset))
        found.append(params)
    params = {name: torch.cat([each[name] for each in found], dim=1) for name in found[0]}
    return QuantizedTensor(grid, (rows, cols), codes.T.contiguous(), params)


def searched(target: Tensor, grid: Adaptive, weights: Tensor) -> Params:
    """`grid.search` on transposed weights [cols, rows], in slices of rows that stay in a core's cache."""
    rows = max(1, 32767 // target.shape[0])
    parts = [grid.search(part.T.contiguous(), weights) for part in target.split(rows, dim=1)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
