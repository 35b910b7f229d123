"""Mixture-of-experts blocks that hold all experts in three-dimensional parameters, with every expert on a grid.

transformers writes such blocks as a loop over experts that takes one matrix out of the parameter and multiplies with
it. That loop is kept as it is; what it is handed instead of the parameter answers to `[expert]` with a stand-in, and
the stand-in multiplies from codes. Experts are decoded one at a time, and only those that tokens are sent to.

The block's fused implementations, which want all experts as one tensor, are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import unwrap
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from whit.grids.grid import Grid
from whit.grids.named import grid_name
from whit.live.twin import Twin, multiplied

NAMES = {"gate_up_proj", "down_proj"}  # what transformers calls the parameters
TOGETHER = {"bmm", "baddbmm", "einsum"}  # products with all experts at once


def has_experts(module: nn.Module) -> bool:
    """Whether a module with three-dimensional parameters is a loop over experts, each with a matrix of every one.

    transformers marks most of its blocks, and says which way their matrices lie. Others are known by the names of their
    parameters, unless they multiply with all experts at once.
    """
    if hasattr(module, "is_transposed"):
        return True
    code = getattr(unwrap(type(module).forward), "__code__", None)
    return module._parameters.keys() >= NAMES and code is not None and not TOGETHER & set(code.co_names)


class QExpert(Twin):
    """One expert's matrix.

    turned  whether the block has it as [in, out]
    """

    def __init__(self, weight: Tensor, grid: Grid, inputs: str | None, turned: bool) -> None:
        """weight  a slice of the block's parameter, copied."""
        super().__init__(nn.Parameter(weight.detach().clone(), weight.requires_grad), grid, inputs)
        self.turned = turned

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return multiplied(self, x, bias)

    def extra_repr(self) -> str:
        """Its grid."""
        return f"weights={grid_name(self.grid)}"


class _StandIn:
    """What the loop multiplies with."""

    def __init__(self, expert: QExpert) -> None:
        self._expert = expert

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            x, other, *rest = args
            bias = rest[0] if rest else kwargs.get("bias")
            if isinstance(other, _StandIn) and not other._expert.turned:
                return other._expert(x, bias)
        elif func in (torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__):
            x, other = args
            if isinstance(other, _StandIn) and other._expert.turned:
                return other._expert(x)
        decoded = [each._expert.weight if isinstance(each, _StandIn) else each for each in args]
        return func(*decoded, **kwargs)


class _Stack:
    """In the place of a parameter [experts, ...]."""

    def __init__(self, experts: nn.ModuleList) -> None:
        self._experts = experts

    def __getitem__(self, index: Any) -> _StandIn:
        return _StandIn(cast(QExpert, self._experts[int(index)]))

    def __len__(self) -> int:
        return len(self._experts)


class QExperts(nn.Module):
    """A block of experts: the original's loop over matrices on a grid.

    inner  the original, with stacks of stand-ins in the place of those parameters
    stacks  name of a parameter -> its experts
    """

    def __init__(self, original: nn.Module, grids: Mapping[str, Grid], inputs: str | None = None) -> None:
        """grids  name of each three-dimensional parameter -> the grid of its matrices"""
        super().__init__()
        turned = bool(getattr(original, "is_transposed", False))
        self.stacks = nn.ModuleDict()
        for name, grid in grids.items():
            stack = cast(Tensor, original._parameters.pop(name))
            experts = nn.ModuleList(QExpert(each, grid, inputs, turned) for each in stack.unbind(0))
            self.stacks[name] = experts
            original.__dict__[name] = _Stack(experts)  # for good: calls in several threads read it at once
        self.inner = original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        plain = getattr(type(self.inner).forward, "__wrapped__", type(self.inner).forward)
        return plain(self.inner, *args, **kwargs)
