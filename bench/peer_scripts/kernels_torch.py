"""Time per product of Whit's kernels and of torch's own: THREADS ROWS COLS M BYTES, one line "name seconds" per pass.

Every call reads another copy of its matrix, BYTES of them in all; with BYTES 0 always the same one. Names without
"whit" are torch's. Calls are timed from Python, with all that a module's forward would pay.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from whit.grids.named import grid_named
from whit.kernels.form import buffer_specs, table_of
from whit.kernels.matmul import linear, linear_int8, quantize_rows
from whit.kernels.packed import Packed
from whit.kernels.pages import together

WHIT = ("q4_0", "int4-g128", "int8", "q8_0", "int3-g64", "int2-g64")
Call = Callable[[list[Tensor]], Tensor]


def random_packed(name: str, shape: tuple[int, int]) -> Packed:
    """A packed matrix of random codes."""
    grid, buffers = grid_named(name), {}
    for key, spec in buffer_specs(grid, shape).items():
        if key == "codes":
            buffers[key] = torch.randint(0, 256, spec.shape, dtype=torch.uint8)
        elif key == "columns":  # evenly spread
            places = torch.arange(spec.shape[1]) * (shape[1] // spec.shape[1])
            buffers[key] = places.to(spec.dtype).repeat(spec.shape[0], 1)
        else:
            buffers[key] = table_of(grid) if key == "table" else torch.rand(spec.shape).to(spec.dtype)
    return Packed(grid, shape, buffers)


def whit_calls(shape: tuple[int, int], m: int) -> Iterator[tuple[str, list[Tensor], Call]]:
    """Name, tensors of a matrix, and the product with such tensors."""
    x = torch.randn(m, shape[1])
    half = x.bfloat16()
    for name in WHIT:
        one = random_packed(name, shape)

        def packed(tensors: list[Tensor], one: Packed = one) -> Packed:
            return Packed(one.grid, shape, dict(zip(one.buffers, tensors, strict=True)))

        def int8(tensors: list[Tensor], packed: Callable[[list[Tensor]], Packed] = packed) -> Tensor:
            return linear_int8(*quantize_rows(x), packed(tensors), None, torch.float32)

        def single(tensors: list[Tensor], packed: Callable[[list[Tensor]], Packed] = packed) -> Tensor:
            return linear(x, packed(tensors))

        def bf16(tensors: list[Tensor], packed: Callable[[list[Tensor]], Packed] = packed) -> Tensor:
            return linear(half, packed(tensors))

        for kind, call in (("int8", int8), ("f32", single), ("bf16", bf16)):
            yield f"whit-{name}-{kind}", list(one.buffers.values()), call


def torch_calls(shape: tuple[int, int], m: int) -> Iterator[tuple[str, list[Tensor], Call]]:
    """As `whit_calls`."""
    rows, cols = shape
    x = torch.randn(m, cols)
    half = x.bfloat16()
    yield "torch-bf16", [torch.randn(shape).bfloat16()], lambda t: F.linear(half, t[0])
    int8 = [torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(rows).bfloat16()]
    yield "torch-int8pack", int8, lambda t: torch._weight_int8pack_mm(half, *t)
    for group in (32, 128):
        if m > 16:  # minutes
            continue
        codes = torch.randint(0, 16, shape, dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.rand(cols // group, rows, 2).bfloat16()

        def int4(t: list[Tensor], group: int = group) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(half, t[0], group, t[1])

        yield f"torch-int4pack-g{group}", [packed, scales], int4
        codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8)
        packed = torch.ops.aten._dyn_quant_pack_4bit_weight(
            codes, torch.rand(rows * (cols // group)), None, group, cols, rows
        )

        def dynamic4(t: list[Tensor], group: int = group) -> Tensor:
            return torch.ops.aten._dyn_quant_matmul_4bit(x, t[0], group, cols, rows)

        yield f"torch-dyn4-g{group}", [packed], dynamic4


def dynamic_layers(shape: tuple[int, int], m: int, n_bytes: float) -> list[Callable[[], Tensor]]:
    """torch's dynamically quantized layers, whose weights are not plain tensors."""
    x, calls = torch.randn(m, shape[1]), []
    W = torch.quantize_per_channel(
        torch.randn(shape), torch.full((shape[0],), 0.02), torch.zeros(shape[0], dtype=torch.int64), 0, torch.qint8
    )
    for _ in range(max(1, int(n_bytes / W.numel()))):
        layer = torch.ao.nn.quantized.dynamic.Linear(shape[1], shape[0], bias_=False)
        layer.set_weight_bias(W, None)
        calls.append(lambda layer=layer: layer(x))
    return calls


def measure(name: str, calls: list[Callable[[], Tensor]], passes: int) -> None:
    """Print the seconds of each call."""
    with torch.inference_mode():
        for turn in range(passes + 1):
            for call in calls:
                start = time.perf_counter()
                call()
                if turn:
                    print(f"{name} {time.perf_counter() - start:.9f}")


def copies_of(tensors: list[Tensor], n: int) -> list[list[Tensor]]:
    """Matrices as they lie in a frozen model: one after the other, on large pages."""
    flat = together([tensor for _ in range(n) for tensor in tensors])
    return [flat[at : at + len(tensors)] for at in range(0, len(flat), len(tensors))]


def main() -> None:
    """Everything in turn, one kind of matrix in memory at a time."""
    threads, rows, cols, m = map(int, sys.argv[1:5])
    n_bytes = float(sys.argv[5])
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    passes = 2 if n_bytes else 40
    for kinds in (whit_calls, torch_calls):
        for name, tensors, call in kinds((rows, cols), m):
            n = max(1, int(n_bytes / sum(t.nbytes for t in tensors)) if m < 64 else 1)
            copies = (
                copies_of(tensors, n) if name.startswith("whit") else [[t.clone() for t in tensors] for _ in range(n)]
            )
            measure(name, [lambda each=each, call=call: call(each) for each in copies], passes if m < 64 else 5)
    measure("torch-int8-dynamic", dynamic_layers((rows, cols), m, n_bytes if m < 64 else 0.0), passes)


if __name__ == "__main__":
    main()
