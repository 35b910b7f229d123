"""Error feedback and polish for codebooks with outliers beside the codes: the rest of the matrix is rounded as ever.

    W - S    goes through the rounding of the codebook, S what lies beside
    S        with codes and levels chosen, the values s of least loss for the outliers o of each row:
             H_oo s = -(delta_0 H)_o,  delta_0 the row's error without them

With that the outliers answer for the errors of other columns, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.grids.grid import Params
from whit.grids.quantized import QuantizedTensor
from whit.grids.sparse import COLUMNS, VALUES, Sparse
from whit.rounding.curvature import Curvature
from whit.rounding.tables import table_feedback, table_polish

PIECE = 1 << 22  # numbers of small systems that are solved at a time


def sparse_feedback(
    W: Tensor, grid: Sparse, c: Curvature, importance: Tensor | None = None, given: bool = False
) -> QuantizedTensor:
    """Codes, levels and outliers of W [rows, cols] float32 under the curvature of its inputs.

    importance  as `table_feedback` takes it
    given       levels are those of W itself instead of those of feedback's targets
    Raises what `table_feedback` raises.
    """
    params = grid.search(W, c.H.diagonal() if importance is None else importance)
    rest = W - grid.beside(params, W.shape[1])
    found = table_feedback(rest, grid.base, c, importance, levels=grid.levels(params) if given else None)
    return _with(grid, found, params)


def sparse_polish(W: Tensor, quantized: QuantizedTensor, grid: Sparse, c: Curvature, sweeps: int) -> QuantizedTensor:
    """Codes and levels as a codebook's, then the outliers; no row gets worse.

    W  [rows, cols] float32
    """
    params = quantized.params
    start = QuantizedTensor(grid.base, quantized.shape, quantized.codes, grid.levels(params))
    found = table_polish(W - grid.beside(params, W.shape[1]), start, grid.base, c, sweeps)
    return refit_outliers(W, _with(grid, found, params), grid, c.H)


def refit_outliers(W: Tensor, quantized: QuantizedTensor, grid: Sparse, H: Tensor) -> QuantizedTensor:
    """The same codes and levels with the outliers' values of least loss, where that helps once they are stored.

    W  [rows, cols] float32
    H  [cols, cols] float32, positive definite
    """
    delta, columns = quantized.dequantize() - W, quantized.params[COLUMNS].long()
    old = quantized.params[VALUES]
    slope = (delta @ H).gather(1, columns)  # [rows, count]
    limit = torch.finfo(torch.float16).max
    size = max(1, PIECE // columns.shape[1] ** 2)
    moves = []
    for some, pull in zip(columns.split(size), slope.split(size), strict=True):
        A = H[some[:, :, None], some[:, None, :]]  # [rows, count, count]
        moves.append(torch.linalg.solve(A.double(), pull.double()).float())
    new = (old.float() - torch.cat(moves)).clamp(-limit, limit).to(torch.float16)
    move = new.float() - old.float()
    moved = torch.zeros_like(delta).scatter_(1, columns, move)
    gain = 2 * (move * slope).sum(1) + torch.linalg.vecdot(moved @ H, moved)
    values = torch.where((gain < 0)[:, None], new, old)
    return QuantizedTensor(grid, quantized.shape, quantized.codes, {**quantized.params, VALUES: values})


def _with(grid: Sparse, found: QuantizedTensor, params: Params) -> QuantizedTensor:
    """What has been rounded without outliers, with them."""
    beside = {name: params[name] for name in (COLUMNS, VALUES)}
    return QuantizedTensor(grid, found.shape, found.codes, {**found.params, **beside})
