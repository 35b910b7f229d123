"""Norms of a live model and the layers that multiply what they return: columns of the latter can be rescaled for free.

    W' = W diag(t),    norm' = norm / t

leaves the function alone if nothing but those layers sees the norm's output. Who sees it is found by running the model
once and comparing where tensors lie; whether a norm's weight is a factor (or one plus a factor, as in Gemma) and
whether something else looks at its output is found by trying: predictions must stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whit.live.modules import QConv1D, QLinear
from whit.live.run import Call, divergence, hooked, log_probabilities, unrounded
from whit.live.twin import Twin

SAME = 1e-6  # nats; what float32 rounding makes of predictions is far below
RELATIVE = 1e-4


@dataclass(frozen=True)
class Pair:
    """A norm and the layers that are given its output.

    name       of the norm
    plus_one   whether the norm multiplies by one plus its weight
    """

    name: str
    norm: nn.Module
    consumers: tuple[Twin, ...]
    plus_one: bool


def pairs_of(model: nn.Module, call: Call) -> list[Pair]:
    """All pairs of an unfrozen model, found with one call and checked with a few more.

    Layers whose codes have been chosen already keep them, and so does the norm before them.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor)
    }
    twins = {
        name: each
        for name, each in model.named_modules()
        if isinstance(each, QLinear | QConv1D) and each.alone and each.frozen is None and each.fixed is None
    }
    made: dict[str, tuple[Tensor, Tensor]] = {}  # norm -> what it was given and what it returned
    given: dict[str, Tensor] = {}
    arrived: dict[str, Tensor] = {}

    def returned(name: str, y: Tensor) -> None:
        made[name] = arrived[name], y

    with (
        torch.no_grad(),
        hooked(norms, arrived.__setitem__),
        hooked(norms, returned, outputs=True),
        hooked(twins, given.__setitem__),
    ):
        call(model)
    found = []
    for name, norm in norms.items():
        if name not in made:
            continue
        consumers = tuple(twins[key] for key, x in given.items() if _same(x, made[name][1]))
        kind = _kind(norm, *made[name]) if consumers else None
        if kind is not None:
            found.append(Pair(name, norm, consumers, kind))
    return _sound(model, found, call)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether it is the very tensor, or a view of all of it, as heads are given."""
    return a is b or (
        isinstance(b, Tensor)
        and (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
    )


def fold(pair: Pair, t: Tensor) -> None:
    """Multiply the consumers' columns by t [cols] and divide what the norm returns."""
    with torch.no_grad():
        _multiply(pair, t)
        _divide(pair.norm, t, pair.plus_one)
    for twin in pair.consumers:
        twin.forget()


def _multiply(pair: Pair, t: Tensor) -> None:
    for twin in pair.consumers:
        W = twin.weight
        W.mul_((t[:, None] if twin.turned else t).to(W.dtype))


def _divide(norm: nn.Module, t: Tensor, plus_one: bool) -> None:
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    weight.copy_((1 + weight) / t - 1 if plus_one else weight / t)
    if isinstance(bias, Tensor):
        bias.div_(t)


def _kind(norm: nn.Module, x: Tensor, y: Tensor) -> bool | None:
    """Whether the norm adds one to its weight; None when it does neither."""
    if not isinstance(y, Tensor) or y.shape[-1:] != norm.weight.shape:
        return None
    t = _test_factors(y.shape[-1])
    state = {key: value.clone() for key, value in norm.state_dict().items()}
    with torch.no_grad():
        for plus_one in (False, True):
            _divide(norm, t, plus_one)
            after = norm(x)
            norm.load_state_dict(state)
            if torch.allclose(after.float() * t, y.float(), rtol=1e-2 if y.dtype.itemsize < 4 else RELATIVE, atol=1e-5):
                return plus_one
    return None


def _test_factors(n: int) -> Tensor:
    """Powers of two, so that float arithmetic loses nothing."""
    return torch.tensor([0.5, 1.0, 2.0]).repeat(-(-n // 3))[:n]


def _sound(model: nn.Module, pairs: Sequence[Pair], call: Call) -> list[Pair]:
    """The pairs that can be folded without changing what the model predicts."""
    with unrounded(model):
        reference = log_probabilities(model, [call])

        def harmless(some: Iterable[Pair]) -> bool:
            chosen = [(pair, _test_factors(_width(pair))) for pair in some]
            kept = [{key: value.clone() for key, value in pair.norm.state_dict().items()} for pair, _ in chosen]
            with torch.no_grad():
                for pair, t in chosen:
                    _multiply(pair, t)
                    _divide(pair.norm, t, pair.plus_one)
                after = divergence(model, [call], reference)
                for (pair, t), state in zip(chosen, kept, strict=True):
                    _multiply(pair, 1 / t)
                    pair.norm.load_state_dict(state)  # dividing back would round one plus a weight
            return after < SAME

        if harmless(pairs):
            return list(pairs)
        return [pair for pair in pairs if harmless([pair])]


def _width(pair: Pair) -> int:
    weight = pair.norm.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
