"""Attention of one token: `python -m bench.attention [--threads 2]`.

The kernel of `whit.kernels.attention` and torch's `scaled_dot_product_attention`, in turn, with the same tensors;
medians of calls from Python.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from whit.kernels.attention import attend

HEADS = {"32 heads on 8": (32, 8), "32 heads": (32, 32), "9 heads on 3": (9, 3)}
TOKENS = (64, 512, 4096)
WIDTH, CALLS = 64, 60


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    print("| dtype | heads | tokens | torch, us | Whit, us | times as fast |\n|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, (heads, key_heads) in HEADS.items():
            for n in TOKENS:
                theirs, ours = _measured(dtype, heads, key_heads, n)
                label = str(dtype).removeprefix("torch.")
                print(f"| {label} | {name} | {n} | {theirs:.0f} | {ours:.0f} | {theirs / ours:.1f} |", flush=True)


@torch.inference_mode()
def _measured(dtype: torch.dtype, heads: int, key_heads: int, n: int) -> tuple[float, float]:
    q = torch.randn(1, heads, 1, WIDTH).to(dtype)
    k, v = (torch.randn(1, key_heads, n, WIDTH).to(dtype) for _ in range(2))
    both: tuple[Callable[[], Tensor | None], ...] = (
        lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda: attend(q, k, v),
    )
    times: list[list[float]] = [[], []]
    for _ in range(CALLS):
        for found, call in zip(times, both, strict=True):
            started = time.perf_counter()
            call()
            found.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
