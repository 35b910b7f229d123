"""Weighted search for the parameters of one group: a few ranges, each refined by least squares.

For fixed codes the best scale (and minimum) is a closed form, and so is what it leaves of the error; for fixed
parameters the best codes are the nearest levels. Starting from several ranges, one step of each gives nearly all of
the gain. The candidate that leaves least is compared with the range rule by the error of the stored parameters, so
what wins is what the decoder will see.

Blocks are x [n_rows, n_groups, size] float32; importance has the same shape; parameters are [n_rows, n_groups].
Source: the make_qx_quants family of GGML uses the same idea; formulas in docs/rounding.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # scaled.py calls these functions; they only need its type
    from whit.grids.scaled import Scaled

N_RANGES = 13  # with a minimum, whose range has two ends
N_SCALES = 7  # without: more bring less than a thousandth
N_REFINED = 2
SINGULAR = 1e-5  # of the squares about zero: a spread of levels below it is rounding noise
FEW_BITS = 2  # with so few levels every start is refined, not the winner alone
POWERS = [1.0, 0.5, 2.0]
LARGE_GROUP = 64  # wider groups have outliers relative to their spread, so stronger clipping can pay


def _range_factors(bits: int, size: int, n_ranges: int = N_RANGES) -> list[float]:
    """Factors on the scale of the range rule: the ends move by about one level, or by half in a large group."""
    n = 2 ** (bits - 1)
    low = 0.5 if size > LARGE_GROUP else n / (n + 1.5)
    return [1.0, *torch.linspace(low, n / (n - 0.9), n_ranges).tolist()]


def search_scale(x: Tensor, importance: Tensor, start: Mapping[str, Tensor], grid: Scaled) -> dict[str, Tensor]:
    """Best stored scale without an offset; both signs when the level set is not symmetric about zero."""
    if torch.finfo(grid.scale_dtype).eps == 1:  # powers of two: the next ones are far away, and least squares too fine
        return _best(x, importance, [{"scale": start["scale"] * factor} for factor in POWERS], grid)
    signs = (1.0,) if grid.levels.mirrored else (1.0, -1.0)
    inverse = _inverse(start["scale"])[..., None]
    best, most = start["scale"], torch.zeros_like(start["scale"])

    def improve(levels: Tensor) -> None:
        nonlocal best, most
        weighted = importance * levels
        along, square = (weighted * x).sum(-1), (weighted * levels).sum(-1)
        explained = along * along / square  # the error left is sum(importance x^2) less this
        better = explained > most
        most = torch.where(better, explained, most)
        best = torch.where(better, along / square, best)

    for sign in signs:
        for factor in _range_factors(grid.levels.bits, x.shape[-1], N_SCALES):
            improve(grid.levels.snap(x * (inverse * (sign / factor))))
    improve(grid.levels.snap(x * _inverse(best)[..., None]))
    return _best(x, importance, [start, {"scale": best}], grid)


def search_minimum(x: Tensor, importance: Tensor, start: Mapping[str, Tensor], grid: Scaled) -> dict[str, Tensor]:
    """Best stored (scale, minimum): for fixed codes a weighted straight-line fit."""
    total = importance.sum(-1)
    mean = torch.where(total > 0, (importance * x).sum(-1) / total, start["minimum"])
    off = x - mean[..., None]
    weighted_off = importance * off
    inverse = _inverse(start["scale"])[..., None]
    shifted = (x - start["minimum"][..., None]) * inverse
    best = dict(start)
    most = torch.zeros_like(total)

    def snapped(scale: Tensor, minimum: Tensor) -> Tensor:
        return grid.levels.snap((x - minimum[..., None]) * _inverse(scale)[..., None])

    def improve(levels: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal most
        weighted = importance * levels
        level = weighted.sum(-1) / total
        along = (weighted_off * levels).sum(-1)  # weighted_off sums to zero, so the mean level drops out
        whole = (weighted * levels).sum(-1)
        square = whole - total * level * level
        square = torch.where(square > SINGULAR * whole, square, torch.inf)  # all on one level: no line to fit
        explained = along * along / square
        better = explained > most
        most = torch.where(better, explained, most)
        scale = along / square
        minimum = mean - scale * level
        best["scale"] = torch.where(better, scale, best["scale"])
        best["minimum"] = torch.where(better, minimum, best["minimum"])
        return scale, minimum

    for factor in _range_factors(grid.levels.bits, x.shape[-1]):
        fitted = improve(grid.levels.snap(shifted / factor))
        if grid.levels.bits <= FEW_BITS:
            improve(snapped(*fitted))
    for _ in range(N_REFINED):  # the winner's own codes may have a better fit still
        improve(snapped(best["scale"], best["minimum"]))
    return _best(x, importance, [start, best], grid)


def search_zero_point(x: Tensor, importance: Tensor, start: Mapping[str, Tensor], grid: Scaled) -> dict[str, Tensor]:
    """Best stored (scale, integer zero point): the zero point of the range rule and its two neighbours."""
    inverse = _inverse(start["scale"])[..., None]
    best = dict(start)
    most = torch.zeros_like(start["scale"])
    for shift in (0.0, -1.0, 1.0):
        zero = (start["zero"] + shift).clamp(0, grid.levels.high)[..., None]
        for factor in _range_factors(grid.levels.bits, x.shape[-1]):
            levels = grid.levels.snap(x * (inverse / factor) + zero) - zero
            weighted = importance * levels
            along, square = (weighted * x).sum(-1), (weighted * levels).sum(-1)
            explained = along * along / square
            better = explained > most
            most = torch.where(better, explained, most)
            best["scale"] = torch.where(better, along / square, best["scale"])
            best["zero"] = torch.where(better, zero[..., 0], best["zero"])
    return _best(x, importance, [start, best], grid)


def _best(x: Tensor, importance: Tensor, candidates: Sequence[Mapping[str, Tensor]], grid: Scaled) -> dict[str, Tensor]:
    """Per group the candidate of least error, stored; the first (the range rule) wins ties."""
    best: dict[str, Tensor] = {}
    least = torch.full(x.shape[:-1], torch.inf)
    most, first = torch.finfo(grid.scale_dtype).max, candidates[0]
    for candidate in candidates:
        fits = torch.stack([value.abs() <= most for value in candidate.values()]).all(0)
        if candidate is not first:  # a fit may leave what the dtype holds; the range rule must not
            candidate = {name: torch.where(fits, value, first[name]) for name, value in candidate.items()}
        stored = grid.store(candidate)
        decoded = grid.decode_blocks(grid.round_blocks(x, stored), stored)
        error = decoded.sub_(x).square_().mul_(importance).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = {name: torch.where(better, value, best.get(name, value)) for name, value in stored.items()}
    return best


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not finite."""
    return scale.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
