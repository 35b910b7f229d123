"""The blocks of a live model: its one long list of modules that are handed each other's hidden states.

What every block is called with beside them (masks, positions) is written down once, with nothing in the blocks' places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from whit.live.experts import QExperts
from whit.live.run import Call
from whit.live.twin import Twin


class _Recorder(nn.Module):
    """Stands where a block stood."""

    def __init__(self, returned: Tensor | None = None) -> None:
        """returned  what it gives; None for what it is given"""
        super().__init__()
        self.given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._returned = returned

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args, kwargs
        if self._returned is not None:
            return self._returned
        return args[0] if args else kwargs["hidden_states"]


@dataclass
class State:
    """Where one call is: what every block is called with, and the hidden states that the next one is given."""

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass
class States:
    """Where several calls are."""

    blocks: list[nn.Module]
    calls: list[State]

    def run(self, block: nn.Module, n: int) -> None:
        """Let a block see call number n; nothing is kept of what it returns."""
        state = self.calls[n]
        called(block, state.arguments[self._number(block)], state.hidden)

    def advance(self, block: nn.Module) -> None:
        """What a block returns is what the next one is given."""
        index = self._number(block)
        with torch.no_grad():
            for state in self.calls:
                state.hidden = called(block, state.arguments[index], state.hidden)

    def _number(self, block: nn.Module) -> int:
        return next(k for k, each in enumerate(self.blocks) if each is block)


def called(block: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], hidden: Tensor) -> Tensor:
    """What a block makes of hidden states [windows, length, width], called as it was recorded."""
    args, kwargs = arguments
    out = block(hidden, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": hidden})
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def chain_of(model: nn.Module, call: Call) -> nn.ModuleList | None:
    """The longest list of modules that are handed each other's hidden states; None when there is none."""
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) > 0]
    for candidate in sorted(lists, key=len, reverse=True):
        if not any(isinstance(each, Twin | QExperts) for block in candidate for each in block.modules()):
            continue
        try:
            state = _record(model, candidate, call)
        except (TypeError, AttributeError, KeyError, RuntimeError, ValueError):
            continue  # what stands in for a block is not one to this model
        if state is not None:
            return candidate
    return None


def _record(model: nn.Module, blocks: nn.ModuleList, call: Call) -> State | None:
    """What every block is called with when the blocks before it do nothing; None when that is no chain."""
    recorders = [_Recorder() for _ in blocks]
    with _replaced(blocks, recorders), torch.no_grad():
        call(model)
    given = [recorder.given for recorder in recorders]
    if any(each is None for each in given):
        return None
    first = [args[0] if args else kwargs.get("hidden_states") for args, kwargs in cast(Any, given)]
    if not isinstance(first[0], Tensor) or any(each is not first[0] for each in first):
        return None
    return State(first[0].clone(), cast(Any, given))


def states_of(model: nn.Module, blocks: nn.ModuleList, calls: Sequence[Call]) -> States:
    """Before the first block, of a chain that `chain_of` found."""
    states = [cast(State, _record(model, blocks, call)) for call in calls]
    return States(list(blocks), states)


def finished(blocks: nn.ModuleList, hidden: Tensor, call: Callable[[], Tensor]) -> Tensor:
    """What a call of the model comes to when its last block has returned `hidden` [windows, length, width]."""
    with _replaced(blocks, [_Recorder(hidden) for _ in blocks]):
        return call()


@contextmanager
def _replaced(blocks: nn.ModuleList, recorders: Sequence[_Recorder]) -> Iterator[None]:
    """While the context lasts, others stand in the blocks' places."""
    originals = dict(blocks._modules)
    for key, recorder in zip(originals, recorders, strict=True):
        blocks._modules[key] = recorder
        for name, value in originals[key].__dict__.items() if originals[key] is not None else ():
            if name not in recorder.__dict__ and not name.startswith("_"):
                recorder.__dict__[name] = value  # such as attention_type, which some models read from their blocks
    try:
        yield
    finally:
        blocks._modules.update(originals)
