"""A device that is none: torch's `meta`, whose tensors have shapes and no values, stands for a GPU.

Operations on tensors of two devices fail on it as on a GPU, so that a run on it shows whether everything is where it
must be. What comes back to the CPU are numbers that mean nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


class _Elsewhere(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._drawn = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return True  # "is all of it finite?"
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return self._some(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].copy_(self._some(args[1].shape, args[0].dtype))
        with self:  # in inference mode operations come whole
            parts = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if parts is NotImplemented else parts

    def _some(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        return torch.rand(shape, generator=self._drawn).add_(0.5).to(dtype)


@contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device, as long as the context lasts."""
    address = Tensor.data_ptr

    def told(tensor: Tensor) -> int:  # taps know weights by their addresses, which all are 0 there
        if not tensor.is_meta:
            return address(tensor)
        return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()

    with monkeypatch.context() as patch, _Elsewhere():
        patch.setattr(Tensor, "data_ptr", told)
        yield META
