"""What moves numbers: Adam, with rates in the units of each, and how far at which step.

Source: arXiv 1412.6980 (Adam).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import nn

from whit.grids.codebook import LEVELS
from whit.tune.moving import Own

BETAS, EPSILON = (0.9, 0.95), 1e-12
OFFSETS = ("offset", "A", "B")  # of a learner
REFERENCE_BITS = 4.5  # at which a rate of scales is what it says; it falls with the step of the grid
# A scale that changes by r moves the outermost level by r / 2 of the range: 2^(bits - 1) steps, whatever the bits.
STEPS = 2.0 ** (REFERENCE_BITS - 1)
WARM = 5  # steps in which rates rise


@dataclass(frozen=True)
class Rates:
    """How far numbers go per step of Adam, at first.

    codes    in steps of the grid
    scales   relative change, at 4.5 bits; more at fewer, in proportion to the step; of levels as far
    vectors  of norms and biases, relative to their root mean square
    """

    codes: float
    scales: float
    vectors: float


class Vector:
    """A norm or bias: what moves is float32, what is seen is as the file has it."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        self._parameter, self._dtype = parameter, dtype
        self.value = nn.Parameter(parameter.detach().float().clone())
        self.size = self.value.detach().square().mean().sqrt().item() or 1.0  # root mean square, at the start

    def rest(self, resting: bool) -> None:
        """Whether it takes no part for now."""
        self._parameter.requires_grad_(not resting)

    def show(self) -> None:
        """What has been learned becomes visible."""
        self._parameter.data.copy_(self.value.data.to(self._dtype))

    def collect(self) -> None:
        """The gradient of what was seen becomes that of what moves."""
        self.value.grad = None if self._parameter.grad is None else self._parameter.grad.float()
        self._parameter.grad = None


class Adam:
    """torch's, over learners and vectors.

    moving  what moves, by name
    state   of torch's optimizer
    """

    def __init__(self, own: Own, vectors: Mapping[str, Vector], rates: Rates) -> None:
        """Vectors may be none."""
        self.moving: dict[str, nn.Parameter] = {}
        groups: list[dict[str, Any]] = [{"params": [], "lr": 0.0}]  # torch wants at least one
        for n, (learner, _) in enumerate(own):
            coarse = 2.0 ** (REFERENCE_BITS - learner.grid.bits_per_weight(learner.shape[1]))
            for name, value in learner.named_parameters():
                self.moving[f"{n}.{name}"] = value
                scales = rates.scales * (STEPS if name == f"change_{LEVELS}" else coarse)
                groups.append({"params": [value], "lr": rates.codes if name in OFFSETS else scales})
        for name, vector in vectors.items():
            self.moving[name] = vector.value
            groups.append({"params": [vector.value], "lr": rates.vectors * vector.size})
        self._rates = [group["lr"] for group in groups]
        self._torch = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        """Steps and moments of every parameter."""
        return self._torch.state

    def step(self, number: int, of: int) -> None:
        """Go, with the gradients that are there; rates rise at first, then fall along a cosine."""
        share = min(1.0, (number + 1) / WARM) * 0.5 * (1 + cos(pi * number / of))
        for group, rate in zip(self._torch.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._torch.step()
        self._torch.zero_grad(set_to_none=True)
