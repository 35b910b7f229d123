"""What arrives at each weight while a block runs: every product with a parameter is seen where it is computed.

The unit is a weight and its tap, never "a Linear": transformers multiplies by nn.Linear, by Conv1D's transposed
matrices and by slices of three-dimensional expert weights. All of them end in `linear` or `addmm`, and the memory
address of the second factor says which weight it is. Weights that are given the very same tensor share a tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Slot = tuple[str, int | None]  # name of a parameter, and which expert of it
Seen = Callable[[Slot, Tensor], None]  # a weight and its inputs [tokens, cols]


class _Watch(TorchFunctionMode):
    def __init__(self, slots: Mapping[int, Slot], seen: Seen, made: Seen | None) -> None:
        super().__init__()
        self._slots, self._seen, self._made = slots, seen, made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        slot = None
        if func is nn.functional.linear:
            slot = self._note(kwargs.get("input", args[0] if args else None), kwargs.get("weight", args[1:2]))
        elif func in (torch.addmm, torch.Tensor.addmm):
            slot = self._note(args[1], args[2])
        elif func in (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__):
            slot = self._note(args[0], args[1])
        out = func(*args, **kwargs)
        if slot is not None and self._made is not None:
            self._made(slot, out)
        return out

    def _note(self, x: Any, weight: Any) -> Slot | None:
        if isinstance(weight, tuple):
            weight = weight[0] if weight else None
        if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.data_ptr() in self._slots):
            return None
        slot = self._slots[weight.data_ptr()]
        self._seen(slot, x)
        return slot


@contextmanager
def watched(block: nn.Module, seen: Seen, made: Seen | None = None) -> Iterator[None]:
    """While the context lasts, `seen` is told of every product with a matrix of `block`, in order of computation.

    made  told of the result of each, [tokens, rows], a bias included
    The tensors they are given are the model's own: they must not be changed.
    """
    slots: dict[int, Slot] = {}
    for name, parameter in block.named_parameters():
        if parameter.dim() == 2:
            slots[parameter.data_ptr()] = (name, None)
        elif parameter.dim() == 3:
            for expert in range(parameter.shape[0]):
                slots[parameter[expert].data_ptr()] = (name, expert)
    with _Watch(slots, seen, made):
        yield
