"""A quantized matrix that learns: its codes follow float offsets, its scales follow relative changes.

    codes   = round((start + offset * step) on the start's own scales)
    scale   = stored(start scale * (1 + change))           outliers beside the codes of a table likewise
    level   = stored(start level + change * step)          of a table, whose levels stay in their order
    matrix  = decode(codes, scales)

With a rank, offsets are a product of two narrow matrices, offset = B A: fewer numbers move.

What is multiplied with is always what a file would hold, so that writing it changes nothing. Offsets are counted in
steps of the grid (the range of a span over its number of levels): a rate of learning then means the same for every
matrix at every number of bits. Codes do not depend on what scales have learned, and a scale's gradient at given codes
is exact:

    dL/dchange = sum over the span of dL/dW * basis * start scale      of a level: sum over its weights of dL/dW * step
    dL/doffset = dL/dW * step                                         straight through the rounding

Source: arXiv 1308.3432 (straight-through); arXiv 2407.11062 (EfficientQAT) for steps trained at given codes;
arXiv 2106.09685 (LoRA).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from whit.grids.codebook import LEVELS, Codebook
from whit.grids.grid import Adaptive, Grid, Params
from whit.grids.quantized import QuantizedTensor
from whit.grids.sparse import Sparse
from whit.live.stored import Stored

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PART = 2**18  # weights that are rounded at a time
FARTHEST = 0.25  # |change| of a scale or an outlier, or of a level in steps
INSIDE = 0.49  # steps; how far from its level a weight may start


class _Learned(torch.autograd.Function):
    """The decoded matrix forward; gradients of offsets and changes backward."""

    @staticmethod
    def forward(ctx: Any, learner: Learner, *moving: Tensor) -> Tensor:
        quantized = learner.quantized()
        ctx.learner, ctx.grid, ctx.shape, ctx.names = learner, quantized.grid, quantized.shape, tuple(quantized.params)
        ctx.save_for_backward(quantized.codes, *quantized.params.values())
        return quantized.dequantize()

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:
        codes, *params = ctx.saved_tensors
        quantized = QuantizedTensor(ctx.grid, ctx.shape, codes, dict(zip(ctx.names, params, strict=True)))
        return None, *ctx.learner.gradients(G, quantized)


class Learner(nn.Module):
    """What moves in one matrix.

    offset   [rows, cols] float32 in steps, None where codes stay or it has a rank
    A, B     [rank, cols], [rows, rank]
    changes  name of a float parameter of the grid -> its relative change (of levels: in steps), of its shape, float32
    """

    def __init__(
        self,
        start: QuantizedTensor,
        codes: bool,
        scales: bool,
        original: Tensor | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        """From a quantized matrix.

        codes, scales  whether they move; codes also later, from `free` to `commit`
        original       [rows, cols] what was rounded: weights start where they were within the reach of their level
        rank, seed     of offsets that are a product
        """
        super().__init__()
        self.grid, self.shape = start.grid, start.shape
        self.stored = Stored(dict(start.params))
        self.register_buffer("codes", start.codes, persistent=False)
        self.offset: nn.Parameter | None = None
        self.A: nn.Parameter | None = None
        self.B: nn.Parameter | None = None
        self._original, self._rank, self._seed = original, rank, seed
        if codes:
            self.free()
        learns = hasattr(start.grid, "bases") or isinstance(start.grid, Codebook | Sparse)
        moving = list(start.params) if scales and learns else []
        self._moving = [name for name in moving if start.params[name].dtype in FLOATS]
        for name in self._moving:  # torch's own dictionary of parameters takes none called "values"
            change = torch.zeros(start.params[name].shape, device=start.codes.device)
            self.register_parameter(f"change_{name}", nn.Parameter(change))

    codes: Tensor
    step: Tensor

    @property
    def changes(self) -> dict[str, nn.Parameter]:
        """By the names of the grid's parameters."""
        return {name: self.get_parameter(f"change_{name}") for name in self._moving}

    def moving(self) -> list[nn.Parameter]:
        """The offset or its factors, then the changes; what is there."""
        return [*(each for each in (self.offset, self.A, self.B) if each is not None), *self.changes.values()]

    def quantized(self) -> QuantizedTensor:
        """The matrix as a file would hold it now."""
        with torch.no_grad(), torch.autocast(self.codes.device.type, enabled=False):
            codes, start = self.codes, self.stored.tensors
            offset = self.offset if self.A is None or self.B is None else self.B @ self.A
            if offset is not None:
                codes = torch.cat([self._rounded(rows, offset, start) for rows in self._parts()])
            params: Params = {
                name: value if name not in self.changes else self._changed(name, value) for name, value in start.items()
            }
        return QuantizedTensor(self.grid, self.shape, codes, params)

    def free(self) -> None:
        """Codes move from where they are now on."""
        start = QuantizedTensor(self.grid, self.shape, self.codes, self.stored.tensors)
        W = start.dequantize()
        self.register_buffer("step", step_of(start), persistent=False)
        if self._rank is not None:
            (rows, cols), device = self.shape, self.codes.device
            generator = torch.Generator().manual_seed(self._seed)
            self.A = nn.Parameter((torch.randn(self._rank, cols, generator=generator) / self._rank**0.5).to(device))
            self.B = nn.Parameter(torch.zeros(rows, self._rank, device=device))
            return
        offset = torch.zeros(self.shape, device=W.device)
        if self._original is not None:
            reach = self.step[..., None]
            distance = self._spans(self._original - W) / reach.clamp(min=torch.finfo(torch.float32).tiny)
            offset = torch.where(reach > 0, distance, 0).clamp_(-INSIDE, INSIDE).view(self.shape)
            stays = self.grid.round(W + self._steps(offset), start.params) == self.codes
            offset *= stays.repeat_interleave(self.grid.step, 1)  # levels of a table may be nearer to each other
        self.offset = nn.Parameter(offset)

    def commit(self, codes: Tensor | None = None) -> None:
        """Codes stay where they have come to, or where they are given; only scales move from now on."""
        self.codes = self.quantized().codes if codes is None else codes
        self.offset = self.A = self.B = None

    @property
    def moves_codes(self) -> bool:
        """Whether codes are still free."""
        return self.offset is not None or self.A is not None

    def forward(self) -> Tensor:
        """The decoded matrix [rows, cols] float32, differentiable by what moves."""
        return cast(Tensor, _Learned.apply(self, *self.moving()))

    def gradients(self, G: Tensor, quantized: QuantizedTensor) -> list[Tensor]:
        """Gradients of `moving()`.

        G  [rows, cols] float32, dL/d decoded matrix
        quantized  what `quantized` returned when it was decoded
        """
        found = [] if self.offset is None else [self._steps(G)]
        if self.A is not None and self.B is not None:
            by_offset = self._steps(G)
            with torch.autocast(self.codes.device.type, enabled=False):
                found = [self.B.T @ by_offset, by_offset @ self.A.T]
        if not self.changes:
            return found
        if isinstance(self.grid, Codebook | Sparse):
            slopes = self.grid.slopes(G, quantized.codes, quantized.params)
            return [*found, *(slopes[name] * self._unit(name) for name in self.changes)]
        bases = cast(Adaptive, self.grid).bases(quantized.codes, quantized.params)
        for name in self.changes:
            start = self.stored.tensors[name].float()
            if start.shape == (1, 1):
                sums = (G * bases[name]).sum().view(1, 1)
            else:
                sums = (G * bases[name]).view(*start.shape, -1).sum(-1)
            found.append(sums * start)
        return found

    def _parts(self) -> list[slice]:
        """Rows in parts that fit the caches; all at once where they share something."""
        rows, cols = self.shape
        n = max(1, PART // cols) if self.grid.row_independent else rows
        return [slice(at, min(at + n, rows)) for at in range(0, rows, n)]

    def _rounded(self, rows: slice, offset: Tensor, start: Params) -> Tensor:
        """Codes of some rows."""
        params = {name: each[rows] if each.shape[0] == self.shape[0] else each for name, each in start.items()}
        step = self.step[rows]
        W = self.grid.decode(self.codes[rows], params)
        moved = offset[rows].reshape(*step.shape, -1) * step[..., None]
        return self.grid.round(W.add_(moved.view(W.shape)), params)

    def _changed(self, name: str, start: Tensor) -> Tensor:
        change = self.changes[name].clamp(-FARTHEST, FARTHEST)
        limit = torch.finfo(start.dtype).max
        moved = torch.addcmul(start.float(), self._unit(name), change).clamp(-limit, limit).to(start.dtype)
        return moved if name != LEVELS else _tables(self.grid, moved).cummax(-1).values.view(moved.shape)

    def _unit(self, name: str) -> Tensor:
        """What a change of 1 adds to a parameter: as much as it is; to levels a step of their table."""
        start = self.stored.tensors[name].float()
        if name != LEVELS:
            return start
        tables = _tables(self.grid, start)
        step = (tables[..., -1:] - tables[..., :1]) / (tables.shape[-1] - 1)
        return step.expand_as(tables).reshape(start.shape)

    def _spans(self, x: Tensor) -> Tensor:
        """[rows, cols] -> [rows, innermost spans, columns of a span]."""
        return x.reshape(*self.step.shape, -1)

    def _steps(self, x: Tensor) -> Tensor:
        """x [rows, cols] times the step of every weight."""
        return (self._spans(x) * self.step[..., None]).view(self.shape)


def _tables(grid: Grid, levels: Tensor) -> Tensor:
    """[tables, levels of one]."""
    base = grid.base if isinstance(grid, Sparse) else cast(Codebook, grid)
    return levels.reshape(-1, base.n_levels)


def step_of(quantized: QuantizedTensor) -> Tensor:
    """[rows, spans] float32: the range of each innermost span over the number of its levels, outliers apart."""
    rows, cols = quantized.shape
    grid, W = quantized.grid, quantized.dequantize()
    if isinstance(grid, Sparse):
        W = W - grid.beside(quantized.params, cols)
        grid = grid.base
    spans = W.view(rows, -1, grid.spans(cols)[-1])
    n_levels = 2.0 ** (grid.bits if isinstance(grid, Codebook) else int(grid.bits_per_weight(cols)))
    return (spans.amax(-1) - spans.amin(-1)) / (n_levels - 1)
