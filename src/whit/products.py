"""Products of float32 matrices by the library that is fastest at them.

torch multiplies float32 with MKL, which on AMD's processors takes its code for AVX2, whatever they can do: half the
speed of oneDNN, which is in torch as well (measured on an EPYC 9005: 104 and 236 GFLOPS on a core, docs/kernels.md).
`linear` and `fast_linear` take oneDNN there; sums are in float32 either way.

And by way of bfloat16, on processors that have units for it: factors are rounded to 8 significant bits, sums are not:
a product is off by about 0.25 % of its size and takes a quarter of the time. For statistics over many tokens, never for
what is reported. Source: oneDNN's floating-point math modes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def coarse_products() -> Iterator[None]:
    """While the context lasts, products of float32 are made so, in all threads; elsewhere nothing changes."""
    before = torch.get_float32_matmul_precision()
    if has_bfloat16():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def mkl_is_slow() -> bool:
    """Whether oneDNN is to be preferred to MKL: on AMD's processors with AVX-512, where Linux says that it is one."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_avx512_supported():
        return False
    about = Path("/proc/cpuinfo")
    return about.exists() and "AuthenticAMD" in about.read_text(errors="replace")


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., cols] and W [rows, cols] to [..., rows]. Without gradients where oneDNN computes it."""
    if not _for_onednn(x, W, bias):
        return F.linear(x, W, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return y


@contextmanager
def fast_linear() -> Iterator[None]:
    """While the context lasts, every `F.linear` of this thread that needs no gradient is `linear` of this module."""
    if not mkl_is_slow():
        yield
        return
    with _Linear():
        yield


class _Linear(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs:  # as nn.Linear calls it
            return linear(*args)
        return func(*args, **(kwargs or {}))


def _for_onednn(x: Tensor, W: Tensor, bias: Tensor | None) -> bool:
    """Plain matrices of float32 in memory, at least one number, no gradient, no other precision asked for."""
    given = [each for each in (x, W, bias) if each is not None]
    return (
        mkl_is_slow()
        and all(
            type(each) in (Tensor, torch.nn.Parameter)
            and each.dtype == torch.float32
            and each.device.type == "cpu"
            and each.layout == torch.strided
            and each.numel() > 0
            for each in given
        )
        and W.dim() == 2
        and x.dim() >= 2
        and not torch.is_autocast_enabled("cpu")
        and torch.get_float32_matmul_precision() == "highest"
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in given))
    )
