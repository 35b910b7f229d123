"""Quantize a Llama with llm-compressor's GPTQModifier; saves compressed-tensors (pack-quantized).

The modifier's own settings: dampening 0.01, blocks of 128, activation order `static`, its default observer.
Weights stay float32 unless bfloat16 is asked for. The cost covers loading, quantizing and saving, not the imports.
"""

from __future__ import annotations

import argparse

import common


def main() -> None:
    """Quantize as the command line says, save, and print the cost."""
    quantize(common.parser(__doc__).parse_args())


def quantize(args: argparse.Namespace) -> None:
    """Load the model, run one-shot GPTQ over the windows and save what the tool saves."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = common.windows(args.tokens, args.samples)
    meter = common.Meter()
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    uneven = common.report_uneven(model, args.group, "the tool refuses them, so they stay in float32")
    weights = QuantizationArgs(num_bits=args.bits, group_size=args.group, strategy="group", symmetric=not args.asym)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head", *uneven])

    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    oneshot(model=model, tokenizer=tokenizer, dataset=DataLoader(rows, batch_size=1), recipe=recipe)
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    meter.report("llm-compressor", "llmcompressor")


if __name__ == "__main__":
    main()
