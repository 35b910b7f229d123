"""Time per product with tables of levels: THREADS ROWS COLS M BYTES, one line "name seconds" per call.

`decode-NAME` decodes the matrix with native code and lets torch multiply, `plain-NAME` decodes it as its grid does, in
torch: what a product costs without a kernel. Calls of `NAME` read another copy of the matrix each, BYTES in all.
"""

import sys

import torch
from kernels_torch import copies_of, measure, random_packed
from torch import Tensor
from torch.nn import functional as F

from whit.kernels.matmul import dequantize, linear
from whit.kernels.packed import Packed, unpack

NAMES = ("kmeans4", "kmeans4-g64", "kmeans4-g128", "kmeans4+0.5%", "kmeans3", "kmeans3-g64", "kmeans2", "kmeans2-g64")
NAMES += ("kmeans8", "kmeans8-tensor")


def main() -> None:
    """Everything in turn, the first name once more at the end: how much the machine itself has changed."""
    threads, rows, cols, m = map(int, sys.argv[1:5])
    n_bytes = float(sys.argv[5])
    torch.set_num_threads(threads)
    x = torch.randn(m, cols)
    for name in (*NAMES, NAMES[0]):
        one = random_packed(name, (rows, cols))
        n = max(1, int(n_bytes / one.n_bytes))

        def again(tensors: list[Tensor], one: Packed = one) -> Packed:
            return Packed(one.grid, one.shape, dict(zip(one.buffers, tensors, strict=True)))

        copies = copies_of(list(one.buffers.values()), n)
        measure(name, [lambda each=each, again=again: linear(x, again(each)) for each in copies], 2 if n > 1 else 40)
        measure(f"decode-{name}", [lambda one=one: F.linear(x, dequantize(one))], 3)
        if name in NAMES[:2]:
            measure(f"plain-{name}", [lambda one=one: F.linear(x, unpack(one).dequantize())], 2)


if __name__ == "__main__":
    main()
