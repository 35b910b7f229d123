"""What every tensor on every grid would cost the model: KL divergence per token, from one backward sweep.

If a layer's outputs change by D x, the divergence of the model's predictions on a text is to second order

    KL = 1/2 mean over labels of (sum over tokens of g . D x)^2,   g = gradient of log p(y) at the layer's output,

with labels y sampled from the model itself (the text's own tokens would give another matrix). Errors of different rows
are independent of each other, so the square falls apart into rows. Two estimates of what is left are combined:

    per token   1/2 sum over rows of mean(g_r^2) * E_r, E_r = D_r H D_r^T the loss that every rounding here knows.
                Hardly noisy, but it forgets that the errors of two tokens may add up on their way
    per window  1/2 sum over rows of (D_r . sum over tokens of g_r x)^2. Right on average, but noisy

The ratio of the two, averaged over all grids, is one factor per tensor on the first. One forward and one backward pass
block by block, and a few rows of every tensor rounded to every grid are enough; no parameter has a gradient, and one
block is in memory at a time.

At the head tokens do not mix and mean(g_r^2) is p_r (1 - p_r), which needs no sampling. A tied embedding is counted in
both roles. Source: generalised Gauss-Newton form of the KL divergence; docs/budget.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from whit.calibration.moments import Moments
from whit.devices import CPU
from whit.grids.grid import Adaptive
from whit.grids.named import grid_named
from whit.models.architecture import GGUFTensor
from whit.models.model import Model
from whit.models.taps import Slot
from whit.parallel import spread
from whit.pipeline.inputs import Inputs, moments_of
from whit.pipeline.sweep import EMBEDDING, HEAD, Gradients, Sweep
from whit.rounding.curvature import Curvature, curvature
from whit.rounding.feedback import adapts, feedback
from whit.rounding.nearest import nearest
from whit.rounding.polish import loss

Progress = Callable[[int, int, str], None]
Damages = dict[str, dict[str, float]]  # tensor -> grid -> nats per token
ROWS = 64  # of every tensor that are rounded to every grid
DAMAGE = "damage"
TINY = 1e-300


@dataclass(frozen=True)
class _Sample:
    """Some rows of a matrix that stand for all of them.

    W       [n, cols] float32
    energy  [n] float64, sum of g_r^2 over tokens, times the number of rows that each stands for
    pushes  [n, windows, cols] float32, sums of g_r x over the tokens of a window, times the root of that number; None
            where tokens do not mix
    """

    tensor: str
    grid: str
    W: Tensor
    energy: Tensor
    pushes: Tensor | None
    c: Curvature
    plain: bool


def sensitivities(
    model: Model,
    candidates: Mapping[str, Sequence[str]],
    windows: Tensor,
    seed: int = 0,
    progress: Progress | None = None,
    plain: bool = False,
    device: torch.device = CPU,
) -> Damages:
    """Nats per token for every tensor and each of its candidates.

    candidates  tensor name -> names of grids
    windows     [n, length] int64
    seed        of the labels
    plain       for plain rounding, not for error feedback
    device      where the model runs; rounding stays on the CPU
    Raises BadWeightsError for weights or activations that are not finite.
    """
    tell = progress or (lambda done, total, what: None)
    found = _Damaged(Sweep(model, windows, seed, tell, device), candidates, plain)
    return found.damages()


class _Damaged:
    """What a sweep finds: rows are drawn, rounded to every candidate, and their errors met with gradients."""

    def __init__(self, sweep: Sweep, candidates: Mapping[str, Sequence[str]], plain: bool) -> None:
        self._sweep, self._candidates, self._plain = sweep, candidates, plain
        self._found: Damages = {}
        head = sweep.tensors[HEAD if HEAD in sweep.tensors else EMBEDDING]
        self._spread = torch.zeros(head.shape[0], dtype=torch.float64)  # sum of p (1 - p)
        self._arrived = Moments(head.shape[1])

    def damages(self) -> Damages:
        gradients = self._sweep.run(self)
        self._head()
        self._embedding(gradients)
        return {name: self._found[name] for name in self._candidates}

    def names(self, there: list[str]) -> list[str]:
        return [name for name in there if name in self._candidates]

    def arrives(self, x: Tensor) -> None:
        self._arrived.add(x)

    def predicts(self, p: Tensor) -> None:
        self._spread += (p - p.square()).sum(0)

    def rows(self, name: str, slot: Slot, outputs: Tensor, in_file: Tensor, scale: Tensor, share: int) -> _Rows:
        return _Rows(outputs, in_file, scale, max(8, ROWS // share))

    def block(self, names: list[str], inputs: Inputs, gradients: Gradients) -> None:
        """Damages of the block's tensors."""
        samples: list[_Sample] = []
        for name in names:
            tensor, slots = self._sweep.tensors[name], self._sweep.links.slots(name)
            seen = moments_of(tensor.shape, inputs, slots)
            if len(seen) == 1:
                seen = seen * len(slots)
            for slot, matrix, moments in zip(slots, _matrices(tensor, len(slots)), seen, strict=True):
                rows = cast(_Rows, gradients.of(name, slot))
                if not rows.drawn.numel() or moments is None or moments.is_empty:
                    continue
                moments.check(name)
                c, W = curvature(moments.H), matrix[rows.in_file[rows.drawn]]
                energy, pushes = rows.weighed()
                samples += [_Sample(name, grid, W, energy, pushes, c, self._plain) for grid in self._candidates[name]]
        self._add(samples)

    def _head(self) -> None:
        name = HEAD if HEAD in self._sweep.tensors else EMBEDDING
        if name in self._candidates:
            W = self._sweep.tensors[name].read()
            drawn, chance = _drawn(self._spread, ROWS)
            self._arrived.check(name)
            c, energy = curvature(self._arrived.H), self._spread[drawn] / chance
            self._add([_Sample(name, grid, W[drawn], energy, None, c, self._plain) for grid in self._candidates[name]])

    def _embedding(self, gradients: list[Tensor]) -> None:
        """The embedding as what the first block is given: an error in it is one of the hidden states themselves."""
        if EMBEDDING not in self._candidates:
            return
        W = self._sweep.tensors[EMBEDDING].read()
        energy = torch.cat([each[0] for each in gradients]).double().square().mean(0)  # [hidden]
        energy *= self._growth(W) ** 2
        uses = torch.bincount(self._sweep.windows.flatten(), minlength=W.shape[0]).double()
        # A row that is used shows its own error: H is diagonal, and the mean over uses takes the place of the sum.
        c = Curvature(energy.float().diag(), energy.sqrt().float().diag())
        rows, _ = _drawn(uses, ROWS, even=0.0)
        tied = HEAD not in self._sweep.tensors
        for grid in self._candidates[EMBEDDING]:
            # a tied one is rounded for its role as the head, which means no more to this one than plain rounding
            decoded = _rounded(W[rows], grid, c, self._plain or tied)
            damage = 0.5 * loss(W[rows], decoded, c.H).mean().item()
            of_one = self._found.setdefault(EMBEDDING, {})
            of_one[grid] = of_one.get(grid, 0.0) + damage

    def _growth(self, W: Tensor) -> float:
        """What embeddings are multiplied with before the first block: 1, in Gemma models the root of their width."""
        once = self._sweep.stream.start(self._sweep.windows[:1])[0][0]
        self._sweep.links.replace(EMBEDDING, 2 * W)
        twice = self._sweep.stream.start(self._sweep.windows[:1])[0][0]
        self._sweep.links.restore()
        given = W[self._sweep.windows[0]]
        return ((twice - once) * given).sum().item() / given.square().sum().item()

    def _add(self, samples: list[_Sample]) -> None:
        """Damages of the tensors that the samples are of, all their grids and experts together."""
        found = spread(_damage, samples, lambda each: each.W.shape[1] ** 1.5)
        sums: dict[str, dict[str, Tensor]] = {}
        for sample, each in zip(samples, found, strict=True):
            of_one = sums.setdefault(sample.tensor, {})
            both = each[DAMAGE] / self._sweep.windows.numel()
            of_one[sample.grid] = of_one[sample.grid] + both if sample.grid in of_one else both
        for name, grids in sums.items():
            both = torch.stack(list(grids.values())).clamp(min=TINY)  # [grids, per token and per window]
            factor = (both[:, 1] / both[:, 0]).log().mean().exp().item()
            of_one_found = self._found.setdefault(name, {})
            for grid, (per_token, _) in grids.items():
                of_one_found[grid] = of_one_found.get(grid, 0.0) + factor * per_token.item()


class _Rows:
    """Drawn rows of one tensor, or one of its experts, and the gradients there.

    outputs  which outputs of the product are the tensor's rows
    in_file  [outputs], which rows
    scale    [outputs], what those are multiplied with to become the weight's
    drawn    [n], indexes into both
    """

    def __init__(self, outputs: Tensor, in_file: Tensor, scale: Tensor, n: int) -> None:
        self.outputs, self.in_file, self._scale, self._n = outputs, in_file, scale, n
        self.drawn, self._chance = torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._energy = torch.zeros(0)
        self._pushes: list[Tensor] = []

    def add(self, gradient: Tensor, x: Tensor) -> None:
        """One window: gradients [tokens, outputs of the product] and inputs [tokens, cols]."""
        here = gradient[:, self.outputs.to(gradient.device)] * self._scale.to(gradient.device)
        if not self.drawn.numel():
            self.drawn, self._chance = _drawn(here.double().square().sum(0).cpu(), self._n)
            self._energy = torch.zeros(self.drawn.numel(), dtype=torch.float64)
        here = here[:, self.drawn.to(here.device)]
        self._energy += here.double().square().sum(0).cpu()
        self._pushes.append((here.T @ x).cpu())

    def weighed(self) -> tuple[Tensor, Tensor]:
        """Energy and pushes as a _Sample has them."""
        return self._energy / self._chance, torch.stack(self._pushes, 1) / self._chance.sqrt().float()[:, None, None]


def _damage(sample: _Sample) -> dict[str, Tensor]:
    """Half the squares, summed over rows: per token and per window."""
    Q = _rounded(sample.W, sample.grid, sample.c, sample.plain)
    per_token = 0.5 * (sample.energy * loss(sample.W, Q, sample.c.H).double()).sum()
    if sample.pushes is None:
        return {DAMAGE: per_token.repeat(2)}
    moved = torch.einsum("rc,rsc->rs", Q - sample.W, sample.pushes).double()
    return {DAMAGE: torch.stack([per_token, 0.5 * moved.square().sum()])}


def _drawn(weight: Tensor, n: int, even: float = 0.5) -> tuple[Tensor, Tensor]:
    """n rows, evenly spread over the sum of their weights, and how many draws each of them could expect.

    weight  [rows], non-negative
    even    share of the draws that do not look at it
    """
    weight = weight.double()
    total, alike = weight.sum(), torch.full_like(weight, 1 / weight.numel())
    share = (1 - even) * weight / total + even * alike if total > 0 else alike
    places = (torch.arange(n, dtype=torch.float64) + 0.5) / n * share.sum()
    rows = torch.searchsorted(share.cumsum(0), places).clamp(max=weight.numel() - 1)
    return rows, n * share[rows]


def _rounded(W: Tensor, name: str, c: Curvature, plain: bool) -> Tensor:
    grid = grid_named(name)
    if plain or not adapts(grid):
        return nearest(W, grid).dequantize()
    return feedback(W, cast(Adaptive, grid), c).dequantize()


def _matrices(tensor: GGUFTensor, n: int) -> Sequence[Tensor]:
    """The matrix of each of n slots: one per expert, or the same for all."""
    W = tensor.read()
    return W.unbind(0) if W.dim() == 3 else [W] * n
