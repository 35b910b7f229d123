"""Run by test_gpu.py with Triton on the path: `interpreted` compares products, `compiled` makes code for devices."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from whit.grids.named import grid_named
from whit.grids.quantized import QuantizedTensor
from whit.kernels import gpu, ops
from whit.kernels.form import ROW_BLOCKS, Kind, block_of
from whit.kernels.matmul import linear, linear_int8, quantize_rows
from whit.kernels.packed import pack

# One of each width, kind of levels, offset, scale dtype and table.
GRIDS = (
    "int2-g32", "int3-g64-asym", "q4_0", "q4_1", "int4-g128-asym", "int4", "int4-tensor", "iq4_nl", "mxfp4", "nvfp4",
    "q5_0", "q5_1", "int6-g64-asym", "int7", "q8_0", "int8", "int8-asym", "fp8", "nf4-g64", "kmeans2", "kmeans3",
    "kmeans4", "kmeans8", "kmeans8-tensor", "kmeans4-g64", "kmeans3+2%",
)  # fmt: skip
GROUPED = ("q4_0", "q4_1", "iq4_nl", "mxfp4", "nvfp4", "q5_0", "q5_1", "q8_0")
SHAPES = ((40, 256), (18, 100))
ROWS = (1, 5)
OBJECTS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def interpreted() -> list[dict[str, Any]]:
    """Per product the largest error, in shares of the sum of magnitudes."""
    found = []
    gpu.usable = lambda: True
    for name in GRIDS:
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(0)
            grid, W = grid_named(name), torch.randn(shape, generator=generator) * 0.05
            if shape[1] % 32 and ("-g" in name or name in GROUPED):
                continue
            params = grid.store(grid.fit(W))
            quantized = QuantizedTensor(grid, shape, grid.round(W, params), params)
            packed, D = pack(quantized), quantized.dequantize().double()
            assert packed.form.kind is not Kind.PLAIN
            bias = torch.randn(shape[0], generator=generator)
            for m in ROWS:
                x = torch.randn(m, shape[1], generator=generator)
                codes, scale = quantize_rows(x)
                with (
                    torch.enable_grad(),
                    patch.object(ops, "on_gpu", lambda x: True),
                    patch.object(ops.library, "NATIVE", None),
                    patch.object(gpu, "linear", wraps=gpu.linear) as called,
                ):
                    products = {
                        "float32": (linear(x, packed, bias), x),
                        "bfloat16": (linear(x.bfloat16(), packed, bias), x.bfloat16()),
                        "int8": (linear_int8(codes, scale, packed, bias), codes * scale),
                    }
                assert called.call_count == 3
                for kind, (y, seen) in products.items():
                    magnitudes = seen.double().abs() @ D.abs().T + bias.abs()
                    error = (y.double() - seen.double() @ D.T - bias).abs() / magnitudes
                    found.append({"grid": name, "shape": shape, "m": m, "x": kind, "error": error.max().item()})
    return found


def compiled() -> list[dict[str, Any]]:
    """What the compiler for NVIDIA's devices makes of kernels: registers, and bytes that did not fit into them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    integers = dict.fromkeys(
        ("m", "rows", "cols", "groups", "blocks", "group_blocks", "share", "zero", "step", "group")
    )
    found = []
    tiles = [(4, 0, False, 1), (3, 2, False, 1), (8, 1, False, 1), (4, 0, True, 4), (4, 1, False, gpu.MOST)]
    for capability in (80, 90):
        jobs: list[tuple[Any, dict[str, Any]]] = []
        for bits, offset, table, m in tiles:
            constants = {"BITS": bits, "BLOCK": block_of(bits), "OFFSET": offset, "TABLE": table}
            jobs.append((gpu._tiles, constants | {"M": m, "ROWS": gpu.TILE_ROWS, "BLOCKS": gpu.BLOCKS}))
        for bits, m in ((2, 1), (3, 1), (4, 1), (8, gpu.MOST)):
            constants = {"BITS": bits, "BLOCK": ROW_BLOCKS[bits], "M": m, "ROWS": gpu.TABLE_ROWS, "STEPS": gpu.STEPS}
            jobs.append((gpu._tables, constants))
        for function, constants in jobs:
            words = function is gpu._tiles
            pointers = {
                "x": "*bf16", "codes": "*i32" if words else "*u8", "scale": "*fp16", "out": "*fp32", "unit": "fp32",
                "offset": "*u8" if constants.get("OFFSET") == 1 else "*fp16", "table": "*fp32" if words else "*fp16",
            }  # fmt: skip
            kinds = pointers | dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
            signature = {name: kinds[name] for name in function.arg_names}
            source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs={})
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(made.asm["cubin"])
                file.flush()
                told = subprocess.run([OBJECTS, "-res-usage", file.name], capture_output=True, text=True, check=True)
            registers, stack = (int(re.findall(rf"{word}:(\d+)", told.stdout)[0]) for word in ("REG", "STACK"))
            found.append({"capability": capability, "registers": registers, "stack": stack, **constants})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()))
