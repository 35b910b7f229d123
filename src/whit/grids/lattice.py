"""Grids whose codes stand for several weights at once: points of a lattice, with signs, under two levels of scales.

    value = d * (2 s_j + 1) * unit * sign * point        d half precision, s_j four bits

A code covers a step of 4 or 8 weights: one or two indices into a table of points with positive coordinates, and a
sign per weight. Where the format stores seven signs for eight weights, their number of minus signs is even.

For given signs the best point is found exactly: the squared error under any metric is linear in the products of a
point's coordinates, so that all points are judged by one matrix product.
Source: the IQ2 and IQ3 block formats of GGML (docs/formats.md). The tables of points are read from the `gguf` package
(MIT licence), which has them from llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import gguf
import torch
from torch import Tensor

from whit.grids.grid import Params, Spec

SIZE = 256
TOP = 15  # largest sub-scale
VECTORS = 2048  # steps worked on at a time, which bounds the table of distances
RANGE_FACTORS = (0.55, 0.65, 0.75, 0.85, 0.95, 1.05)  # on the scale that lays the largest weight on the largest point
D_FACTORS = (1.0, 0.94, 1.06, 0.88, 1.12)
LATE = (-2, -1, 1, 2)  # sub-scales tried around the one there is


@dataclass(frozen=True)
class Lattice:
    """A lattice grid of GGML.

    name    of the format, whose points the gguf package has
    width   coordinates of a point
    bits    of an index
    parity  whether every eight weights have an even number of minus signs
    sub     weights per sub-scale
    unit    value = d * (2 s + 1) * unit * point
    """

    name: str
    width: int
    bits: int
    parity: bool
    sub: int
    unit: float

    @property
    def step(self) -> int:
        """8 weights per code, 4 for single short points with free signs."""
        return 8 if self.parity else self.width

    @property
    def row_independent(self) -> bool:
        """Superblocks never span rows."""
        return True

    @property
    def parts(self) -> int:
        """Points per code."""
        return self.step // self.width

    def spans(self, cols: int) -> tuple[int, ...]:
        """Superblock and sub-block."""
        return (SIZE, self.sub)

    def bits_per_weight(self, cols: int) -> float:
        """Indices, signs, sub-scales and the float."""
        signs = self.step - self.parity
        return (self.bits * self.parts + signs) / self.step + 4 / self.sub + 16 / SIZE

    def code_spec(self, shape: tuple[int, int]) -> Spec:
        """int32, one code per step: indices from the lowest bit on, then a sign per weight (1 = minus)."""
        return Spec((shape[0], shape[1] // self.step), torch.int32)

    def schema(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """`scale` [rows, superblocks] half, `sub_scale` [rows, sub-blocks] uint8. Raises ValueError."""
        rows, cols = shape
        if cols % SIZE:
            raise ValueError(f"rows of {cols} weights do not divide into superblocks of {SIZE}")
        return {
            "scale": Spec((rows, cols // SIZE), torch.float16),
            "sub_scale": Spec((rows, cols // self.sub), torch.uint8),
        }

    def fit(self, W: Tensor) -> Params:
        """The largest weight of each sub-block laid onto the largest coordinate."""
        return self._flat(self._ranged(self._sub_blocks(W)))

    def search(self, W: Tensor, weights: Tensor | None) -> Params:
        """Stored parameters of small weighted squared error, never worse than those of `fit` in any superblock."""
        x = self._sub_blocks(W)  # [rows, n, S, sub]
        w = torch.ones_like(x) if weights is None else self._sub_blocks(weights.expand_as(W))
        best = self._ranged(x)
        least = self._errors(x, w, self._scale(best)).sum(-1)  # [rows, n]
        scale = self._real(x, w)
        for factor in D_FACTORS:
            candidate = self._integers(scale, scale.amax(-1) / self._multiple(TOP) * factor)
            error = self._errors(x, w, self._scale(candidate)).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best["scale"] = torch.where(better, candidate["scale"], best["scale"])
            best["sub_scale"] = torch.where(better[..., None], candidate["sub_scale"], best["sub_scale"])
        return self._flat(self._moved(x, w, best, (-1, 1)))

    def late(self, W: Tensor, weights: Tensor, params: Params, inner: int) -> Params:
        """Sub-scale `inner` of one superblock chosen again for W [rows, sub]."""
        own = {"scale": params["scale"], "sub_scale": params["sub_scale"][:, None, inner : inner + 1]}
        chosen = self._moved(W[:, None, None], weights.expand_as(W)[:, None, None], own, LATE)
        sub_scale = params["sub_scale"].clone()
        sub_scale[:, inner] = chosen["sub_scale"][:, 0, 0]
        return {**params, "sub_scale": sub_scale}

    def store(self, params: Params) -> Params:
        """Already rounded by `fit` and `search`; raises OverflowError for a float that is not finite."""
        if not torch.isfinite(params["scale"]).all():
            raise OverflowError("a scale does not fit float16")
        return params

    def round(self, W: Tensor, params: Params, weights: Tensor | None = None) -> Tensor:
        """int32 codes [rows, cols // step] of least weighted squared error."""
        x = self._sub_blocks(W)
        w = torch.ones_like(x) if weights is None else self._sub_blocks(weights.expand_as(W))
        codes = self._codes(x, w, self._scale(self._blocks(params)))
        return codes.view(W.shape[0], -1)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """[rows, cols] float32."""
        rows = codes.shape[0]
        scale, _ = self.effective(params)
        values = self.values(codes.reshape(-1)).view(rows, -1, self.sub)
        return (values * scale[..., None]).view(rows, -1)

    def effective(self, params: Params) -> tuple[Tensor, Tensor | None]:
        """d (2 s_j + 1) unit per sub-block [rows, cols // sub] float32."""
        scale = self._scale(self._blocks(params))
        return scale.view(scale.shape[0], -1), None

    def bases(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """(2 s_j + 1) unit * point for d."""
        rows = codes.shape[0]
        multiple = self._multiple(params["sub_scale"].float())
        values = self.values(codes.reshape(-1)).view(rows, -1, self.sub)
        return {"scale": (values * multiple[..., None]).view(rows, -1)}

    def values(self, codes: Tensor) -> Tensor:
        """Signed points of codes [n] int32 -> [n, step] float32."""
        points, mask = _points(self.name).to(codes.device), (1 << self.bits) - 1
        indices = torch.stack([(codes >> (self.bits * part)) & mask for part in range(self.parts)], dim=1)
        bit = torch.arange(self.step, dtype=torch.int32, device=codes.device)
        signs = (codes >> (self.bits * self.parts))[:, None] >> bit
        magnitudes = points.index_select(0, indices.reshape(-1)).view(-1, self.step)
        return magnitudes * (1 - 2 * (signs & 1)).float()

    def nearest(self, x: Tensor, weights: Tensor) -> Tensor:
        """int32 codes [n] of the signed points that minimise sum(weights * (x - point)^2).

        x, weights  [n, step] float32. Exact but for the choice of signs when their parity is bound.
        """
        return torch.cat([self._nearest(*each) for each in zip(x.split(VECTORS), weights.split(VECTORS), strict=True)])

    def nearest_under(self, x: Tensor, P: Tensor) -> Tensor:
        """int32 codes [n] of small (x - point) P (x - point)^T for x [n, step] and P [step, step] positive definite.

        Two patterns of signs are tried, that of x and the next cheapest; for each the points are chosen exactly, or
        in turns where a code has two.
        """
        return torch.cat([self._nearest_under(each, P) for each in x.split(VECTORS)])

    def _nearest(self, x: Tensor, w: Tensor) -> Tensor:
        minus = x < 0
        if self.parity:
            odd = minus.sum(1, keepdim=True) % 2 == 1
            cheapest = (w * x * x).argmin(1, keepdim=True)
            minus = minus.scatter(1, cheapest, minus.gather(1, cheapest) ^ odd)
        along = torch.where(minus, -x, x)
        coefficients = torch.cat([w.reshape(-1, self.width), (-2 * w * along).view(-1, self.width)], 1)
        index = (coefficients @ _squares(self.name).to(x.device)).argmin(1).view(-1, self.parts)
        return self._code(index, minus)

    def _nearest_under(self, x: Tensor, P: Tensor) -> Tensor:
        minus = x < 0
        two = (P.diagonal() * x * x).topk(2, dim=1, largest=False).indices  # [n, 2]
        first, second = (torch.zeros_like(minus).scatter(1, two[:, i : i + 1], True) for i in (0, 1))
        if self.parity:
            odd = minus.sum(1, keepdim=True) % 2 == 1
            patterns = (minus ^ (first & odd), minus ^ torch.where(odd, second, first | second))
        else:
            patterns = (minus, minus ^ first)
        pulled = x @ P  # P is symmetric
        found = [self._points_under(x, pulled, P, pattern) for pattern in patterns]
        (code, cost), (other, other_cost) = found
        return torch.where(other_cost < cost, other, code)

    def _points_under(self, x: Tensor, pulled: Tensor, P: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and v P v^T - 2 v P x^T [n] for given signs."""
        sign = 1 - 2 * minus.float()
        v = x.clone()
        index = torch.zeros(x.shape[0], self.parts, dtype=torch.int64)
        width, points = self.width, _points(self.name)
        upper = torch.triu_indices(width, width)
        for part in (*range(self.parts), *range(self.parts - 1)):
            own = slice(part * width, (part + 1) * width)
            block, s = P[own, own], sign[:, own]
            linear = v @ P[:, own] - v[:, own] @ block - pulled[:, own]
            double = torch.where(upper[0] == upper[1], 1.0, 2.0) * block[upper[0], upper[1]]
            coefficients = torch.cat([s[:, upper[0]] * s[:, upper[1]] * double, 2 * s * linear], 1)
            index[:, part] = (coefficients @ _products(self.name)).argmin(1)
            v[:, own] = points[index[:, part]] * s
        cost = torch.linalg.vecdot(v, v @ P - 2 * pulled)
        return self._code(index, minus), cost

    def _code(self, index: Tensor, minus: Tensor) -> Tensor:
        code = torch.zeros(index.shape[0], dtype=torch.int32, device=index.device)
        for part in range(self.parts):
            code |= index[:, part].int() << (self.bits * part)
        bit = torch.arange(self.step, dtype=torch.int32, device=index.device)
        signs = (minus.int() << bit).sum(1, dtype=torch.int32)
        return code | (signs << (self.bits * self.parts))

    def _ranged(self, x: Tensor) -> dict[str, Tensor]:
        scale = x.abs().amax(-1) / self._largest
        return self._integers(scale, scale.amax(-1) / self._multiple(TOP))

    def _real(self, x: Tensor, w: Tensor) -> Tensor:
        """Real-valued scales [rows, n, S]: several ranges, each refined by least squares."""
        start = x.abs().amax(-1) / self._largest
        best = torch.zeros_like(start)
        least = torch.full_like(start, torch.inf)
        for factor in RANGE_FACTORS:
            values = self._points_at(x, w, start * factor)
            square = (w * values * values).sum(-1)
            scale = torch.where(square > 0, (w * x * values).sum(-1) / square, 0.0)
            error = (values * scale[..., None]).sub_(x).square_().mul_(w).sum(-1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scale, best)
        return best

    def _moved(self, x: Tensor, w: Tensor, params: Mapping[str, Tensor], moves: tuple[int, ...]) -> dict[str, Tensor]:
        """Per sub-block the best of its integer and its neighbours."""
        best, least = dict(params), self._errors(x, w, self._scale(params))
        for move in moves:
            s = (params["sub_scale"].short() + move).clamp_(0, TOP).to(torch.uint8)
            error = self._errors(x, w, self._scale({**params, "sub_scale": s}))
            better = error < least
            least = torch.where(better, error, least)
            best["sub_scale"] = torch.where(better, s, best["sub_scale"])
        return best

    def _codes(self, x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        inverse = scale.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return self.nearest((x * inverse[..., None]).reshape(-1, self.step), w.reshape(-1, self.step))

    def _points_at(self, x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        """The signed points nearest to x / scale, shaped like x."""
        return self.values(self._codes(x, w, scale)).view(x.shape)

    def _errors(self, x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        """Weighted squared error per sub-block [rows, n, S]."""
        return self._points_at(x, w, scale).mul_(scale[..., None]).sub_(x).square_().mul_(w).sum(-1)

    def _integers(self, scale: Tensor, d: Tensor) -> dict[str, Tensor]:
        """Stored parameters: d in half precision, and the integers nearest to the scales under it."""
        half = d.half()
        half = torch.where((half == 0) & (d > 0), torch.tensor(2.0**-24, dtype=torch.float16), half)
        inverse = half.float().reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        s = ((scale * inverse[..., None] / self.unit - 1) / 2).round_().clamp_(0, TOP)
        return {"scale": half, "sub_scale": s.to(torch.uint8)}

    def _scale(self, params: Mapping[str, Tensor]) -> Tensor:
        """[rows, n, S] float32."""
        return params["scale"].float()[..., None] * self._multiple(params["sub_scale"].float())

    def _multiple(self, s):  # type: ignore[no-untyped-def]
        """What d is multiplied with under the sub-scale s, a number or a tensor."""
        return (2 * s + 1) * self.unit

    @property
    def _largest(self) -> float:
        return float(_points(self.name).max())

    def _sub_blocks(self, matrix: Tensor) -> Tensor:
        rows, cols = matrix.shape
        self.schema((rows, cols))
        return matrix.reshape(rows, cols // SIZE, SIZE // self.sub, self.sub)

    def _blocks(self, params: Params) -> dict[str, Tensor]:
        rows, n = params["scale"].shape
        return {**params, "sub_scale": params["sub_scale"].reshape(rows, n, -1)}

    def _flat(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**params, "sub_scale": params["sub_scale"].reshape(params["scale"].shape[0], -1)}


@cache
def _points(name: str) -> Tensor:
    """The format's points [n, width] float32."""
    source = getattr(gguf.quants, name.upper())
    source.init_grid()
    return torch.from_numpy(source.grid.copy()).view(source.grid_shape).float()


@cache
def _squares(name: str) -> Tensor:
    """[2 width, n]: squared coordinates, then the coordinates."""
    points = _points(name)
    return torch.cat([points.square(), points], 1).T.contiguous()


@cache
def _products(name: str) -> Tensor:
    """[width (width + 1) / 2 + width, n]: products of all pairs of coordinates, then the coordinates."""
    points = _points(name)
    first, second = torch.triu_indices(points.shape[1], points.shape[1])
    return torch.cat([points[:, first] * points[:, second], points], 1).T.contiguous()
