"""What counts as lost where the columns of a file have been rescaled; the rest is tested through verify."""

from __future__ import annotations

import torch

from whit.grids.named import grid_named
from whit.pipeline.damage import _damage
from whit.rounding.nearest import nearest

INT8 = grid_named("int8")  # one scale per row


def test_what_rescaled_columns_leave_no_room_for_is_not_lost() -> None:
    """A weight whose column is 300 times what it was takes the scale of its row, and leaves the others zero."""
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    W[:, 200] = 0.0
    W[5, 200] = 4.0
    columns = torch.ones(256)
    columns[200] = 300.0
    quantized = nearest(W * columns, INT8)
    Q = quantized.dequantize() / columns
    assert not Q[5, :200].any()
    assert "zero" in _damage(Q, W, INT8, {}).fault  # on columns as they are there would be room
    assert _damage(Q, W, INT8, {}, columns).fault == ""
    quantized.params["scale"][7] = 0
    fault = _damage(quantized.dequantize() / columns, W, INT8, {}, columns).fault
    assert "weights are zero, but should not be (row 7 from column 0)" in fault
