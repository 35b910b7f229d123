"""Running a live model on a few batches, as its owner calls it, and comparing what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import ModelError
from whit.live.inputs import Inputs
from whit.live.twin import Twin

Batch = Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        """Call again, without a cache of keys and values where the model can do without."""
        cached = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
        return model(*self.args, **{**self.kwargs, **cached})

    @property
    def counted(self) -> Tensor | None:
        """[windows, length] bool, which positions are no padding; None without an attention_mask of that shape."""
        mask = self.kwargs.get("attention_mask")
        return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def positions(x: Tensor, counted: Tensor | None) -> Tensor:
    """[positions, cols], those of x [..., cols] that count; all where x is not [windows, length, cols].

    counted  as `Call.counted`
    """
    if counted is None or x.shape[:-1] != counted.shape:
        return x.flatten(0, -2)
    return x[counted.to(x.device)]


def calls_of(batches: Batch | Sequence[Batch]) -> list[Call]:
    """Calls from token ids [n, length] (a window each), or from batches that are tensors or keyword arguments."""
    if isinstance(batches, Tensor):
        return [Call((each,), {}) for each in batches.split(1)]
    if isinstance(batches, Mapping):
        return [Call((), batches)]
    return [Call((each,), {}) if isinstance(each, Tensor) else Call((), each) for each in batches]


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Call]]:
    """The calls that are made while the context lasts."""
    calls: list[Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length():  # a later step of generating: it cannot be called again
            return
        calls.append(Call(args, {key: value for key, value in kwargs.items() if key != "past_key_values"}))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def log_probabilities(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """Per call [positions, classes] float32, log softmax of the logits.

    Raises ModelError when the model returns no logits.
    """
    with torch.no_grad():
        return [logits_of(model, call).float().flatten(0, -2).log_softmax(-1) for call in calls]


def logits_of(model: nn.Module, call: Call) -> Tensor:
    """[..., positions, classes] of one call. Raises ModelError when the model returns none."""
    out = call(model)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if logits is None:
        raise ModelError(f"{type(model).__name__} returns no logits, so nothing is known of its predictions.")
    return logits


def divergence(model: nn.Module, calls: Sequence[Call], reference: Sequence[Tensor]) -> float:
    """Mean KL(reference || model) over all positions, in nats."""
    total, n = 0.0, 0
    for call, wanted in zip(calls, reference, strict=True):
        (found,) = log_probabilities(model, [call])
        total += (wanted.exp() * (wanted - found)).sum(-1).clamp(min=0).double().sum().item()
        n += wanted.shape[0]
    return total / max(1, n)


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """While the context lasts nothing is dropped: dropout would make other weights matter."""
    training = [each for each in model.modules() if each.training]
    model.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """While the context lasts, unfrozen matrices and all activations are what they are in float."""
    twins = [(each, each.active) for each in model.modules() if isinstance(each, Twin)]
    inputs = [(each, each.enabled) for each in model.modules() if isinstance(each, Inputs)]
    for twin, _ in twins:
        twin.active = False
    for each, _ in inputs:
        each.enabled = False
    try:
        yield
    finally:
        for twin, was in twins:
            twin.active = was
        for each, was in inputs:
            each.enabled = was


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None], outputs: bool = False
) -> Iterator[None]:
    """While the context lasts, `seen` is told what arrives at (or leaves) the modules, by their keys."""
    handles = []

    def told(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any = None) -> None:
            seen(key, out if outputs else next(iter((*args, *kwargs.values()))))

        return hook

    for key, module in modules.items():
        register = module.register_forward_hook if outputs else module.register_forward_pre_hook
        handles.append(register(told(key), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
