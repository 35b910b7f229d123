"""Weighted search for the parameters of one group: a few ranges, each refined by least squares.

For fixed codes the best scale (and minimum) is a closed form; for fixed parameters the best codes are the
nearest levels. Starting from several ranges, one step of each gives nearly all of the gain. The error of a
candidate is that of the stored parameters, so what wins is what the decoder will see, and the range rule
itself is always among the candidates.

Blocks are x [n_rows, n_groups, size] float32; importance has the same shape; parameters are [n_rows, n_groups].
Source: the make_qx_quants family of GGML uses the same idea; formulas in docs/rounding.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # scaled.py calls these functions; they only need its type
    from whit.grids.scaled import Scaled

N_RANGES = 13  # with a minimum, whose range has two ends
N_SCALES = 7  # without: more bring less than a thousandth
POWERS = [1.0, 0.5, 2.0]
LARGE_GROUP = 64  # wider groups have outliers relative to their spread, so stronger clipping can pay


def _range_factors(bits: int, size: int, n_ranges: int = N_RANGES) -> list[float]:
    """Factors on the scale of the range rule: the ends move by about one level, or by half in a large group."""
    n = 2 ** (bits - 1)
    low = 0.5 if size > LARGE_GROUP else n / (n + 1.5)
    return [1.0, *torch.linspace(low, n / (n - 0.9), n_ranges).tolist()]


def search_scale(x: Tensor, importance: Tensor, start: Mapping[str, Tensor], grid: Scaled) -> dict[str, Tensor]:
    """Best stored scale without an offset; both signs when the level set is not symmetric about zero."""
    signs = (1.0,) if grid.levels.mirrored else (1.0, -1.0)
    powers = torch.finfo(grid.scale_dtype).eps == 1  # scales that are powers of two: the next ones are far away
    factors = POWERS if powers else _range_factors(grid.levels.bits, x.shape[-1], N_SCALES)

    def candidates() -> Iterable[dict[str, Tensor]]:
        for sign in signs:
            for factor in factors:
                rough = {"scale": start["scale"] * (sign * factor)}
                if factor == 1.0 or powers:
                    yield rough
                levels = grid.levels.values(grid.round_blocks(x, rough))
                yield {"scale": _ratio((importance * x * levels).sum(-1), (importance * levels**2).sum(-1), rough)}

    return _best(x, importance, candidates(), grid)


def search_minimum(x: Tensor, importance: Tensor, start: Mapping[str, Tensor], grid: Scaled) -> dict[str, Tensor]:
    """Best stored (scale, minimum): for fixed codes a weighted straight-line fit."""
    total = importance.sum(-1)
    mean = _ratio((importance * x).sum(-1), total, {"scale": start["minimum"]})

    def candidates() -> Iterable[dict[str, Tensor]]:
        for factor in _range_factors(grid.levels.bits, x.shape[-1]):
            rough = {"scale": start["scale"] * factor, "minimum": start["minimum"]}
            if factor == 1.0:
                yield rough
            levels = grid.levels.values(grid.round_blocks(x, rough))
            level = _ratio((importance * levels).sum(-1), total, rough)
            off = levels - level[..., None]
            scale = _ratio((importance * off * (x - mean[..., None])).sum(-1), (importance * off**2).sum(-1), rough)
            yield {"scale": scale, "minimum": mean - scale * level}

    return _best(x, importance, candidates(), grid)


def search_zero_point(x: Tensor, importance: Tensor, start: Mapping[str, Tensor], grid: Scaled) -> dict[str, Tensor]:
    """Best stored (scale, integer zero point): the zero point of the range rule and its two neighbours."""

    def candidates() -> Iterable[dict[str, Tensor]]:
        for shift in (0.0, -1.0, 1.0):
            zero = (start["zero"] + shift).clamp(0, grid.levels.high)
            for factor in _range_factors(grid.levels.bits, x.shape[-1]):
                rough = {"scale": start["scale"] * factor, "zero": zero}
                if factor == 1.0:
                    yield rough
                levels = grid.levels.values(grid.round_blocks(x, rough)) - zero[..., None]
                scale = _ratio((importance * x * levels).sum(-1), (importance * levels**2).sum(-1), rough)
                yield {"scale": scale, "zero": zero}

    return _best(x, importance, candidates(), grid)


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: Mapping[str, Tensor]) -> Tensor:
    """numerator / denominator, and the starting scale where the denominator is zero."""
    return torch.where(denominator > 0, numerator / denominator, otherwise["scale"])


def _best(x: Tensor, importance: Tensor, candidates: Iterable[Mapping[str, Tensor]], grid: Scaled) -> dict[str, Tensor]:
    """Per group the candidate of least error, stored; the first (the range rule) wins ties."""
    best: dict[str, Tensor] = {}
    least = torch.full(x.shape[:-1], torch.inf)
    for candidate in candidates:
        stored = grid.store(candidate)
        decoded = grid.decode_blocks(grid.round_blocks(x, stored), stored)
        error = decoded.sub_(x).square_().mul_(importance).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = {name: torch.where(better, value, best.get(name, value)) for name, value in stored.items()}
    return best
