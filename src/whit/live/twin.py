"""The matrix of a live module: a float parameter that is seen rounded, until it is frozen to codes.

While training or calibrating, the parameter keeps its name, so that optimizers, state_dicts and tied weights work as
ever; whoever multiplies gets decode(round(W)), with gradients straight through. Freezing replaces the parameter by
its codes. Tied modules share one parameter before and one set of codes after.

Parameters of the grid are found from W whenever W has changed, as the range of a group says, or are fixed because a
search or error feedback has chosen them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from whit.errors import BadWeightsError
from whit.grids.grid import Grid, Params
from whit.grids.quantized import QuantizedTensor
from whit.kernels.matmul import dequantize, linear, linear_rounded
from whit.live.inputs import Inputs
from whit.live.learner import Learner
from whit.live.stored import Frozen, Stored
from whit.rounding.nearest import nearest

SUMMED = 1024  # rows at a time


class _Through(torch.autograd.Function):
    """decode(codes, params) forward; backward W gets the gradient as it is, every float parameter its own."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, codes: Tensor, grid: Grid, names: tuple[str, ...], *params: Tensor) -> Tensor:
        given = dict(zip(names, params, strict=True))
        ctx.grid, ctx.names = grid, names
        ctx.save_for_backward(codes, *params)
        return grid.decode(codes, given)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        codes, *params = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        grads: list[Tensor | None] = [None] * len(params)
        if any(wanted):
            leaves = [value.detach().requires_grad_(each) for value, each in zip(params, wanted, strict=True)]
            with torch.enable_grad():
                decoded = ctx.grid.decode(codes, dict(zip(ctx.names, leaves, strict=True)))
            found = iter(torch.autograd.grad(decoded, [leaf for leaf in leaves if leaf.requires_grad], gradient))
            grads = [next(found) if each else None for each in wanted]
        return gradient, None, None, None, *grads


def straight_through(W: Tensor, quantized: QuantizedTensor) -> Tensor:
    """The decoded matrix [rows, cols] float32, whose gradient W [rows, cols] gets as if it was W.

    Float parameters of the grid that require gradients get theirs: d decoded / d parameter at fixed codes.
    Source: arXiv 1308.3432; arXiv 1902.08153 (LSQ) for the steps.
    """
    names, params = tuple(quantized.params), tuple(quantized.params.values())
    return cast(Tensor, _Through.apply(W, quantized.codes, quantized.grid, names, *params))


class Twin(nn.Module):
    """A module with one matrix, and perhaps quantized inputs. Subclasses are final: they only multiply.

    grid    of the matrix
    inputs  how what arrives is quantized, None for not at all
    frozen  the codes, None before
    like    with them, a tensor of no elements, cast as the weights would have been
    active  whether the matrix is seen rounded
    learner  what is trained in the place of the parameter, None for the parameter itself
    lent    a decoded matrix that is multiplied with, whatever else is there, while a training loop says so
    alone   whether it is all of its layer (live/salient.py): else no factor may be folded into its columns
    """

    turned = False  # whether the parameter is [in, out]
    # What transformers, when it saves a model, need write under one name only: tied twins have these in common.
    _tied_weights_keys = dict.fromkeys(("learner", "fixed", "frozen"), "")
    told = False  # whether state_dicts hold `like`, because it decides what is returned
    like: Tensor

    def __init__(self, weight: Tensor, grid: Grid, inputs: str | None) -> None:
        """weight  the original's own parameter, shared with whatever it is tied to."""
        super().__init__()
        self._parameters["weight"] = cast(nn.Parameter, weight)  # a property has the name
        self.grid, self.active, self.alone = grid, True, True
        self.inputs = None if inputs is None else Inputs(inputs)
        self.frozen: Frozen | None = None
        self.fixed: Stored | None = None
        self.learner: Learner | None = None
        self.lent: Tensor | None = None
        self._seen: tuple[Any, Tensor] | None = None
        self._chosen: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """As the original has it: the parameter, or what the codes stand for, in the dtype that it would have now."""
        parameter = self._parameters.get("weight")
        if parameter is not None:
            return parameter
        W = dequantize(cast(Frozen, self.frozen).packed, self.like.dtype)
        return W.T if self.turned else W

    @property
    def matrix(self) -> Tensor:
        """[rows, cols], the parameter or the codes decoded."""
        return self.weight.T if self.turned else self.weight

    def quantized(self) -> QuantizedTensor:
        """Codes and parameters of the matrix as it is now."""
        if self.frozen is not None:
            return self.frozen.quantized
        if self.learner is not None:
            return self.learner.quantized()
        W = self.matrix.detach().float().contiguous()
        if self.fixed is None:
            try:
                return nearest(W, self.grid)
            except OverflowError as error:
                raise BadWeightsError(f"a matrix {list(W.shape)} leaves its grid's range: {error}.") from None
        params: Params = self.fixed.tensors
        rows, cols = W.shape
        codes = self._kept()
        if codes is None:
            with torch.no_grad():
                codes = self.grid.round(W, params)
        return QuantizedTensor(self.grid, (rows, cols), codes, params)

    def seen(self) -> Tensor:
        """[rows, cols], what is multiplied with before freezing, in the parameter's dtype; differentiable."""
        if self.lent is not None:
            return self.lent
        W = self.matrix
        if not self.active:
            return W
        if self.learner is not None:
            return cast(Tensor, self.learner()).to(W.dtype)
        scales = [] if self.fixed is None else list(self.fixed.tensors.values())
        trained = torch.is_grad_enabled() and (W.requires_grad or any(each.requires_grad for each in scales))
        if trained:
            self._seen = None  # what learns may be changed where no key shows it
            return straight_through(W, self.quantized()).to(W.dtype)
        key = self._key(), *((each.data_ptr(), each._version) for each in scales)
        if key[0] is None:
            return self.quantized().dequantize().to(W.dtype)
        if self._seen is None or self._seen[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # it may be seen again by whoever needs gradients of x
                self._seen = key, self.quantized().dequantize().to(W.dtype)
        return self._seen[1]

    def _key(self) -> tuple[Any, ...] | None:
        """Another one whenever the parameter has changed; None when that cannot be seen.

        A change through `parameter.data` shows in no key. Training makes such changes, and averages of weights come so
        when a model goes from training to evaluation: both drop what was seen.
        """
        parameter = self._parameters.get("weight")
        if parameter is None or parameter.is_inference():
            return None
        return parameter.data_ptr(), parameter._version, parameter.device, parameter.dtype

    def train(self, mode: bool = True) -> Self:
        """As ever; what is seen next is made of the parameter as it is then."""
        self._seen = None
        return super().train(mode)

    def _sums(self) -> Tensor:
        """Of the parameter's bits as integers, per column: others once values have changed, however that was done."""
        W = self.weight.detach().contiguous()
        bits = W.view({1: torch.int8, 2: torch.int16}.get(W.itemsize, torch.int32))
        parts = [part.sum(0, dtype=torch.int64) for part in bits.split(SUMMED)]  # torch widens all that it sums
        return torch.stack(parts).sum(0)

    def _kept(self) -> Tensor | None:
        """The codes that were chosen, unless the parameter has changed since."""
        if self._chosen is None:
            return None
        sums, codes = self._chosen
        now = self._sums()
        same = sums.device == now.device and torch.equal(sums, now)
        return codes if same else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None, "lent": None}  # keys hold for this very parameter alone

    def fix(self, quantized: QuantizedTensor) -> None:
        """From now on the matrix is these codes; parameters of the grid stay when it is trained further."""
        parameter = self._parameters["weight"]
        assert parameter is not None  # only before freezing
        Q = quantized.dequantize().to(parameter.dtype)
        with torch.no_grad():
            parameter.copy_(Q.T if self.turned else Q)
        self.fixed, self._seen = Stored({name: value.clone() for name, value in quantized.params.items()}), None
        self._chosen = self._sums(), quantized.codes  # the parameter may have too few bits for all of its codes

    def tied_to(self, other: Twin) -> bool:
        """Whether both see the same parameter, on the same grid."""
        return self._parameters.get("weight") is other._parameters.get("weight") and self.grid == other.grid

    def fix_as(self, other: Twin) -> None:
        """From now on the matrix is what it is for a twin that it is tied to."""
        self.fixed, self._chosen, self._seen = other.fixed, other._chosen, None

    def forget(self) -> None:
        """The parameter has been changed from outside: nothing that was chosen for it holds."""
        self._seen, self._chosen, self.fixed = None, None, None

    def thaw(self, parameter: nn.Parameter) -> None:
        """A parameter in the place of the codes, which have been taken out before: [rows, cols], or turned."""
        self.frozen, self.fixed = None, None
        del self.like
        self._parameters["weight"] = parameter

    def become(self, frozen: Frozen) -> None:
        """Only these codes are left."""
        parameter = self._parameters.pop("weight")
        assert parameter is not None  # only before freezing
        self.register_buffer("like", torch.empty(0, dtype=parameter.dtype), persistent=self.told)
        self.frozen, self.fixed, self._seen, self._chosen = frozen, None, None, None
        self.learner, self.lent = None, None


class Ties:
    """Codes that were made for parameters: twins of one parameter and one grid share theirs.

    It holds on to the parameters, because an identity says nothing once its owner is gone.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, Grid], tuple[Tensor, Frozen]] = {}

    def freeze(self, twin: Twin, make: Callable[[], Frozen]) -> None:
        """Let a twin become its codes: those of a twin that it is tied to, or what `make` makes."""
        parameter = twin._parameters["weight"]
        assert parameter is not None
        key = id(parameter), twin.grid
        if key not in self._made:
            self._made[key] = parameter, make()
        twin.become(self._made[key][1])


def part(model: nn.Module, twins: Iterable[Twin]) -> list[Twin]:
    """Give twins a copy of a parameter that others have too, before their codes are written to it.

    model  with the others: layers that stay float, twins on another grid or not among the given
    twins  those of one parameter and one grid go on sharing
    Returns those that have got a copy.
    """
    owners = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    groups: dict[tuple[int, Grid], list[Twin]] = {}
    for twin in twins:
        groups.setdefault((id(twin.weight), twin.grid), []).append(twin)
    parted: list[Twin] = []
    for (key, _), group in groups.items():
        if owners[key] == len(group):
            continue
        owners[key] -= len(group)
        W = group[0].weight
        own = nn.Parameter(W.detach().clone(), W.requires_grad)
        for twin in group:
            twin._parameters["weight"] = own
        parted += group
    return parted


def multiplied(twin: Twin, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., cols] times the transposed matrix of a twin, plus the bias [rows]: [..., rows]."""
    modules = twin._modules  # torch's own way to an attribute takes half a microsecond
    inputs, frozen = cast("Inputs | None", modules.get("inputs")), cast("Frozen | None", modules.get("frozen"))
    if frozen is None:
        return functional.linear(x if inputs is None else inputs(x), twin.seen(), bias)
    dtype = _autocast(x) if torch._C._is_any_autocast_enabled() else x.dtype
    if inputs is None:
        return linear(x if dtype is x.dtype else x.to(dtype), frozen.packed, bias)
    learning = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if inputs.counts and not learning and x.dtype != torch.float64:  # sums of codes end in float32
        given = x if dtype is x.dtype else x.float()
        return linear_rounded(given, inputs.scale if inputs.static else None, frozen.packed, bias).to(dtype)
    return linear(inputs(x).to(dtype), frozen.packed, bias)


def _autocast(x: Tensor) -> torch.dtype:
    """What torch, which casts nothing for the kernels' operators, would multiply x in: float64 it leaves alone."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype
