"""Quantize a Llama with GPTQModel, by GPTQ (its defaults, no act-order) or AWQ; saves its GPTQ or AWQ checkpoint.

The cost covers loading, quantizing and saving, not the imports.
"""

from __future__ import annotations

import argparse
import os

import common


def main() -> None:
    """Quantize as the command line says, save, and print the cost."""
    parser = common.parser(__doc__)
    parser.add_argument("--awq", action="store_true", help="GPTQModel's AWQ (gemm layout) instead of GPTQ")
    quantize(parser.parse_args())


def quantize(args: argparse.Namespace) -> None:
    """Load the model, quantize it over the windows and save what the tool saves."""
    # Its default is one worker on up to two cores, which its own pool of two loaders then refuses.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, ((os.cpu_count() or 1) + 1) // 2)))
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig
    from gptqmodel.utils.cpp import load_pack_block_extension

    load_pack_block_extension()  # compiled once and kept; a quarter of a minute that is not quantizing
    tokens = common.windows(args.tokens, args.samples)
    meter = common.Meter()
    make = AWQConfig if args.awq else GPTQConfig
    config = make(bits=args.bits, group_size=args.group, sym=not args.asym, device="cpu")
    # Its AWQ kernels refuse to pack float32.
    dtype = torch.float16 if args.awq else torch.bfloat16 if args.bfloat16 else torch.float32
    model = GPTQModel.load(str(args.model), config, dtype=dtype)
    print(f"note: GPTQModel works on {model.model.dtype} weights", flush=True)
    common.report_uneven(model.model, args.group, "AWQ refuses" if args.awq else "their last group is shorter")

    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
    backend = BACKEND.AWQ_TORCH if args.awq else BACKEND.AUTO
    model.quantize(rows, batch_size=1, calibration_sort=None, backend=backend)
    model.save(str(args.out))
    meter.report("gptqmodel-awq" if args.awq else "gptqmodel", "gptqmodel")


if __name__ == "__main__":
    main()
