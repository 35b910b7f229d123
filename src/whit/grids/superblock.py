"""Grids with two levels of scales: superblocks of 256 weights, each with one float scale for its integer sub-scales.

    value = d * s_j * level                 (Q3_K, Q6_K, IQ4_XS)
    value = d * s_j * level - dmin * m_j    (Q2_K, Q4_K, Q5_K)

d and dmin are half-precision floats per superblock, s_j and m_j small integers per sub-block of 16 or 32 weights.

The search works from inside out and back: real-valued scales for every sub-block by weighted least squares, then for
several d near the one that just fits the largest of them the integers nearest to those scales, and for the best of
these the neighbours of each pair of integers. What decides is always the weighted error of the decoded values.
Source: the K-quant and IQ4_XS block formats of GGML (docs/formats.md); the search in docs/rounding.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from whit.grids.grid import Params, Spec
from whit.grids.levels import Integers, Levels
from whit.grids.scaled import Offset, PerGroup, Scaled

SIZE = 256
# Factors on the d that just fits: larger ones leave room above, smaller ones clip the largest sub-block.
D_FACTORS = (1.0, 0.97, 0.94, 1.03, 1.06)
LARGEST = 65504.0
SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Superblock:
    """A two-level grid of GGML.

    levels   of one weight
    sub      weights per sub-block, 16 or 32
    low      smallest sub-scale
    high     largest sub-scale; of the minima too, which start at 0
    minimum  whether sub-blocks have a minimum (the negative of what is stored)
    """

    levels: Levels
    sub: int
    low: int
    high: int
    minimum: bool = False

    def __post_init__(self) -> None:
        if self.minimum and not (isinstance(self.levels, Integers) and self.levels.zero == 0 and self.low == 0):
            raise ValueError("a minimum needs unsigned levels and unsigned sub-scales")

    @property
    def step(self) -> int:
        """One code per weight."""
        return 1

    @property
    def row_independent(self) -> bool:
        """Superblocks never span rows."""
        return True

    def spans(self, cols: int) -> tuple[int, ...]:
        """Superblock and sub-block."""
        return (SIZE, self.sub)

    def bits_per_weight(self, cols: int) -> float:
        """Codes, integer sub-scales (and minima) and half-precision floats."""
        bits = (self.high - self.low).bit_length()
        n = 2 if self.minimum else 1
        return self.levels.bits + n * bits / self.sub + n * 16 / SIZE

    def code_spec(self, shape: tuple[int, int]) -> Spec:
        """uint8, one code per weight."""
        return Spec(shape, torch.uint8)

    def schema(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """`scale` [rows, superblocks] half, `sub_scale` [rows, sub-blocks] int8; the same again for minima (uint8)."""
        rows, cols = shape
        if cols % SIZE:
            raise ValueError(f"rows of {cols} weights do not divide into superblocks of {SIZE}")
        outer, inner = (rows, cols // SIZE), (rows, cols // self.sub)
        schema = {"scale": Spec(outer, torch.float16), "sub_scale": Spec(inner, torch.int8)}
        if self.minimum:
            schema |= {"minimum": Spec(outer, torch.float16), "sub_minimum": Spec(inner, torch.uint8)}
        return schema

    def fit(self, W: Tensor) -> Params:
        """Ranges of the sub-blocks, the largest of them laid onto the largest integer."""
        x = self._sub_blocks(W)
        start = self._inner.fit(x.flatten(0, 2))
        scale = start["scale"].view(x.shape[:3])
        minimum = start["minimum"].view(x.shape[:3]).clamp(max=0) if self.minimum else None
        if minimum is not None:  # a range that leaves zero out is widened to hold it
            scale = (x.amax(-1) - minimum).clamp(min=0) / self.levels.high
        d, dmin = self._outer(scale, minimum)
        return self._flat(self._integers(scale, minimum, d, dmin))

    def search(self, W: Tensor, weights: Tensor | None) -> Params:
        """Stored parameters of small weighted squared error, never worse than those of `fit` in any superblock."""
        x = self._sub_blocks(W)
        w = torch.ones_like(x) if weights is None else self._sub_blocks(weights.expand_as(W))
        scale, minimum = self._real(x, w)
        plain = self._blocks(self.store(self.fit(W)))
        best, least = plain, self._errors(x, w, plain).sum(-1)  # per superblock [rows, n]
        for factor, factor_min in self._factors():
            d, dmin = self._outer(scale, minimum)
            d = d * factor
            dmin = None if dmin is None else dmin * factor_min
            candidate = self._integers(scale, minimum, d, dmin)
            error = self._errors(x, w, candidate).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best = {name: _where(better, candidate[name], value) for name, value in best.items()}
        return self._flat(self._neighbours(x, w, best))

    def late(self, W: Tensor, weights: Tensor, params: Params, inner: int) -> Params:
        """Sub-scale (and minimum) `inner` of one superblock chosen again for W [rows, sub]."""
        x = W[:, None, None]
        w = weights.expand_as(W)[:, None, None]
        scale, minimum = self._real(x, w)
        old = {
            name: value[:, inner : inner + 1, None].mT if name.startswith("sub") else value
            for name, value in params.items()
        }
        found = self._integers(scale, minimum, params["scale"].float(), _maybe(params, "minimum"))
        better = self._errors(x, w, found)[..., 0] < self._errors(x, w, old)[..., 0]  # [rows, 1]
        chosen = {name: _where(better, found[name], value) for name, value in old.items()}
        chosen = self._neighbours(x, w, chosen)
        new = {name: value.clone() for name, value in params.items()}
        for name in new:
            if name.startswith("sub"):
                new[name][:, inner] = chosen[name][:, 0, 0]
        return new

    def store(self, params: Params) -> Params:
        """Already rounded by `fit` and `search`; raises OverflowError for a float that is not finite."""
        for name in ("scale", "minimum"):
            if name in params and not torch.isfinite(params[name]).all():
                raise OverflowError(f"a {name} does not fit float16")
        return params

    def round(self, W: Tensor, params: Params, weights: Tensor | None = None) -> Tensor:
        """uint8 codes [rows, cols]."""
        return self._codes(self._sub_blocks(W), self._blocks(params)).view(W.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """[rows, cols] float32."""
        blocks = codes.view(codes.shape[0], -1, SIZE // self.sub, self.sub)
        return self._values(blocks, self._blocks(params)).view(codes.shape)

    def effective(self, params: Params) -> tuple[Tensor, Tensor | None]:
        """d * s_j and -dmin * m_j per sub-block [rows, cols // sub] float32."""
        scale, offset = self._scales(self._blocks(params))
        rows = scale.shape[0]
        return scale.reshape(rows, -1), None if offset is None else -offset.reshape(rows, -1)

    def bases(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """s_j * level for d, -m_j for dmin."""
        level = self.levels.values(codes)
        bases = {"scale": level * params["sub_scale"].float().repeat_interleave(self.sub, 1)}
        if self.minimum:
            bases["minimum"] = -params["sub_minimum"].float().repeat_interleave(self.sub, 1)
        return bases

    @property
    def _inner(self) -> Scaled:
        """The grid of one sub-block if its scale were a real number."""
        offset = Offset.MINIMUM if self.minimum else Offset.NONE
        levels = replace(self.levels, mirrored=False) if isinstance(self.levels, Integers) else self.levels
        return Scaled(levels, PerGroup(self.sub), offset, torch.float32)

    def _real(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Real-valued scales (and minima, at most 0) of sub-blocks x, w [rows, n, S, sub]."""
        flat, importance = x.reshape(-1, self.sub), w.reshape(-1, self.sub)
        found = self._inner.search(flat, importance)
        if not self.minimum:
            scale = found["scale"].view(x.shape[:3])
            return (scale.abs() if self.low >= 0 else scale), None
        scale, minimum = found["scale"], found["minimum"]
        above = minimum > 0
        if above.any():
            without = replace(self._inner, offset=Offset.NONE)
            alone = without.search(flat, importance)["scale"].clamp(min=0)
            scale = torch.where(above, alone, scale)
            minimum = minimum.clamp(max=0)
        return scale.view(x.shape[:3]), minimum.view(x.shape[:3])

    def _outer(self, scale: Tensor, minimum: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """d and dmin [rows, n] float32 with which the largest scale and minimum just fit."""
        if self.low < 0:  # the longer, negative end takes the scale of largest magnitude, whatever its sign
            largest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))[..., 0]
            d = largest / self.low
        else:
            d = scale.amax(-1) / self.high
        return d, None if minimum is None else -minimum.amin(-1) / self.high

    def _factors(self) -> list[tuple[float, float]]:
        if not self.minimum:
            return [(factor, 1.0) for factor in D_FACTORS]
        return [(1.0, 1.0), *((f, 1.0) for f in D_FACTORS[1:]), *((1.0, f) for f in D_FACTORS[1:]), (0.97, 0.97)]

    def _integers(self, scale: Tensor, minimum: Tensor | None, d: Tensor, dmin: Tensor | None) -> dict[str, Tensor]:
        """Stored parameters: d and dmin in half precision, and the integers nearest to the scales under them."""
        d = _half(d)
        s = (scale * _inverse(d.float())[..., None]).round_().clamp_(self.low, self.high)
        params = {"scale": d, "sub_scale": s.to(torch.int8)}
        if minimum is not None and dmin is not None:
            dmin = _half(dmin)
            m = (-minimum * _inverse(dmin.float())[..., None]).round_().clamp_(0, self.high)
            params |= {"minimum": dmin, "sub_minimum": m.to(torch.uint8)}
        return params

    def _neighbours(self, x: Tensor, w: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per sub-block the best of its integers and their neighbours."""
        best = dict(params)
        least = self._errors(x, w, best)  # [rows, n, S]
        moves = product((-1, 0, 1), (-1, 0, 1) if self.minimum else (0,))
        for move, move_min in moves:
            if move == move_min == 0:
                continue
            s = (params["sub_scale"].short() + move).clamp_(self.low, self.high).to(torch.int8)
            candidate = {**params, "sub_scale": s}
            if self.minimum:
                m = (params["sub_minimum"].short() + move_min).clamp_(0, self.high).to(torch.uint8)
                candidate["sub_minimum"] = m
            error = self._errors(x, w, candidate)
            better = error < least
            least = torch.where(better, error, least)
            for name in best:
                if name.startswith("sub"):
                    best[name] = torch.where(better, candidate[name], best[name])
        return best

    def _errors(self, x: Tensor, w: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Weighted squared error per sub-block [rows, n, S]."""
        return self._values(self._codes(x, params), params).sub_(x).square_().mul_(w).sum(-1)

    def _codes(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        scale, offset = self._scales(params)
        if offset is not None:
            x = x + offset[..., None]
        return self.levels.nearest(x * _inverse(scale)[..., None])

    def _values(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        scale, offset = self._scales(params)
        values = self.levels.values(codes).mul_(scale[..., None])
        return values if offset is None else values.sub_(offset[..., None])

    def _scales(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """d * s_j and dmin * m_j, [rows, n, S] float32."""
        scale = params["scale"].float()[..., None] * params["sub_scale"].float()
        if not self.minimum:
            return scale, None
        return scale, params["minimum"].float()[..., None] * params["sub_minimum"].float()

    def _sub_blocks(self, matrix: Tensor) -> Tensor:
        rows, cols = matrix.shape
        self.schema((rows, cols))
        return matrix.reshape(rows, cols // SIZE, SIZE // self.sub, self.sub)

    def _blocks(self, params: Params) -> dict[str, Tensor]:
        """Sub-block parameters [rows, n * S] -> [rows, n, S]."""
        n = params["scale"].shape[1]
        return {name: v.view(v.shape[0], n, -1) if name.startswith("sub") else v for name, v in params.items()}

    def _flat(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: v.reshape(v.shape[0], -1) if name.startswith("sub") else v for name, v in params.items()}


def _half(value: Tensor) -> Tensor:
    """float16, in which nothing but zero becomes zero; what is too large becomes infinite and is refused later."""
    half = value.half()
    lost = (half == 0) & (value != 0)
    return torch.where(lost, torch.copysign(torch.tensor(SMALLEST), value).half(), half)


def _inverse(scale: Tensor) -> Tensor:
    return scale.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _where(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Choose per superblock [rows, n] among parameters [rows, n] or [rows, n, S]."""
    return torch.where(better if new.dim() == 2 else better[..., None], new, old)


def _maybe(params: Params, name: str) -> Tensor | None:
    return params[name].float() if name in params else None
