"""Running a live model on a few batches, as its owner calls it, and comparing what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whit.errors import ModelError, RecipeError
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


def calls_of(batches: Any, tokenizer: Callable[..., Any] | None = None) -> list[Call]:
    """Calls from a text to calibrate with; what is empty is left out, such as the empty lines of a file.

    batches    token ids [n, length], a window each, or any iterable (a DataLoader, a generator) of batches: tensors or
               keyword arguments as the model takes them, lists of token ids, texts, or lists of these
    tokenizer  for texts
    Raises RecipeError for anything else, and for texts without a tokenizer.
    """
    if isinstance(batches, np.ndarray):
        batches = torch.as_tensor(batches)
    if isinstance(batches, Tensor):
        return [Call((each,), {}) for each in batches.split(1) if each.numel()]
    if isinstance(batches, Mapping):
        return [Call((), batches)]
    if isinstance(batches, str):
        if tokenizer is None:
            raise RecipeError("Texts need a tokenizer: quantize(..., calibration=texts, tokenizer=tokenizer).")
        return _window(tokenizer(batches)["input_ids"])
    if isinstance(batches, list) and batches and all(isinstance(each, int) for each in batches):
        return _window(batches)
    try:
        several = iter(batches)
    except TypeError:
        raise RecipeError(
            "calibration= takes token ids, batches as the model takes them, or texts, alone or in any iterable; "
            f"found {type(batches).__name__}."
        ) from None
    return [call for each in several for call in _batch(each, tokenizer)]


def _batch(batch: Any, tokenizer: Callable[..., Any] | None) -> list[Call]:
    """Calls of one of several batches: tensors go to the model whole."""
    if isinstance(batch, np.ndarray):
        batch = torch.as_tensor(batch)
    if isinstance(batch, tuple | list) and len(batch) == 1 and isinstance(batch[0], Tensor):
        (batch,) = batch  # as a TensorDataset gives it
    if isinstance(batch, Tensor):
        if batch.dim() == 1 and not batch.is_floating_point():
            batch = batch[None]
        return [Call((batch,), {})] if batch.numel() else []
    if isinstance(batch, tuple | list) and any(isinstance(each, Tensor) for each in batch):
        raise RecipeError(
            f"A batch of the calibration is a {type(batch).__name__} of {len(batch)}, with tensors: give the token ids "
            "alone, or a dictionary of what the model takes."
        )
    return calls_of(batch, tokenizer)


def _window(ids: Sequence[int]) -> list[Call]:
    return [Call((torch.tensor([ids], dtype=torch.long),), {})] if len(ids) else []


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
