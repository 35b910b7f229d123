"""Products of float32 matrices by way of bfloat16, on processors that have units for it.

Factors are rounded to 8 significant bits, sums are not: a product is off by about 0.25 % of its size and takes a
quarter of the time. For statistics over many tokens, never for what is reported.
Source: oneDNN's floating-point math modes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
