"""Quantize a Llama with AutoRound; saves the GPTQ layout (its format `auto_gptq`).

AutoRound's own settings (200 iterations a block, batches of 8, torch.compile), but in float32 rather than bfloat16.
It quantizes a layer only when 32 divides its inputs and its outputs, says which it skips, and pads a last group that
is not full. Whatever the mask says, it leaves the last token of a window out of the loss.
The cost covers loading, quantizing and saving, not the imports.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import common


def main() -> None:
    """Quantize as the command line says, save, and print the cost."""
    parser = common.parser(__doc__)
    parser.add_argument("--iters", type=int, default=200, help="tuning steps a block; 0 for no tuning")
    parser.add_argument("--format", default="auto_gptq", help="the tool's name of the format to save in")
    quantize(parser.parse_args())


def quantize(args: argparse.Namespace) -> None:
    """Load the model, tune the rounding over the windows and save what the tool saves."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = common.windows(args.tokens, args.samples)
    meter = common.Meter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    common.report_uneven(model, args.group, "their last group is shorter, but for the layers that the tool skips")
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
    rounding = AutoRound(
        model,
        tokenizer,
        bits=args.bits,
        group_size=args.group,
        sym=not args.asym,
        iters=args.iters,
        dataset=rows,
        nsamples=len(rows),
        seqlen=tokens.shape[1],
        batch_size=min(8, len(rows)),
        device_map="cpu",
        amp=args.bfloat16,
    )
    _, folder = rounding.quantize_and_save(str(args.out), format=args.format)
    _move_up(Path(folder), args.out)
    print(f"note: AutoRound worked in {rounding.model_context.amp_dtype}", flush=True)
    meter.report("auto-round", "auto-round")


def _move_up(folder: Path, out: Path) -> None:
    """AutoRound saves in a folder of its own naming inside the one it was given; put its files into the latter."""
    if folder.resolve() != out.resolve():
        for file in folder.iterdir():
            shutil.move(file, out / file.name)
        folder.rmdir()


if __name__ == "__main__":
    main()
