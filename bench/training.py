"""What training with quantization in the loop brings back: files that are badly hurt, and llama.cpp's.

`python -m bench.training [--rows 2 3 4 q4_0] [--steps 80] [--block-steps 120]`

2, 3, 4   folders of GPTQ in groups of 64, preset `balanced` on 128 windows, trained on the same windows
q4_0      a GGUF file by llama.cpp's own quantizer, trained after the original, read by llama.cpp afterwards

The share of the lost perplexity that comes back, and KL, on text that nobody saw; each with its processor seconds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from bench.measure import run
from bench.models import float_gguf, inputs
from bench.peers import WORK, llama_cpp
from whit.evaluation.compare import compare_states, final_states
from whit.models.open import open_model
from whit.runtime.generate import generate

REPORTED = 24


def main() -> None:
    """One row per file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", nargs="*", default=["2", "3", "4", "q4_0"])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.03)
    parser.add_argument("--block-steps", type=int, default=120)
    arguments = parser.parse_args()
    given = inputs(arguments.model, arguments.samples, REPORTED)
    model, name, ids = open_model(arguments.model), given.name, given.ids
    reference = final_states(model, ids)
    print(f"{name}, {arguments.block_steps} steps of 4 windows in every block, {arguments.steps} of 2 end to end\n")
    print("| file | KL | trained | perplexity (original) | trained | of the loss | CPU seconds | bytes |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for row in arguments.rows:
        start, out = _start(row, given.folder, arguments.samples), WORK / f"trained-{name}-{row}"
        out = out.with_suffix(start.suffix)
        command = [
            sys.executable,
            "-m",
            "bench.tuned",
            start,
            given.folder,
            given.tokens,
            out,
            "--steps",
            str(arguments.steps),
        ]
        done = run(*command, "--rate", str(arguments.rate), "--block-steps", str(arguments.block_steps))
        first, second = (compare_states(final_states(open_model(each), ids), reference, ids) for each in (start, out))
        lost = first.perplexity - first.perplexity_reference
        back = (first.perplexity - second.perplexity) / lost
        size = "as before" if open_model(out).n_bytes == open_model(start).n_bytes else "OTHER"
        print(
            f"| {row} | {first.kl_mean:.4f} | {second.kl_mean:.4f} ({second.kl_mean / first.kl_mean:.2f}) | "
            f"{first.perplexity:.2f} ({first.perplexity_reference:.2f}) | {second.perplexity:.2f} | {back:.0%} | "
            f"{done.cpu_seconds:.0f} | {size} |",
            flush=True,
        )
        if start.suffix:
            answer = "".join(generate(out, "The capital of France is", 8))
            print(f"llama.cpp answers: {answer!r}", flush=True)


def _start(row: str, folder: Path, samples: int) -> Path:
    """The file that training begins with, made when it is not there."""
    name = folder.name.removesuffix("-f32")
    if row.startswith("q"):
        path = WORK / f"rival.{name}.{row}.gguf"
        if not path.exists():
            subprocess.run(
                [llama_cpp("llama-quantize"), float_gguf(), path, row.upper()], check=True, capture_output=True
            )
        return path
    path = WORK / f"gpu-{name}-{row}-64-balanced"
    if not path.exists():
        command = [sys.executable, "-c", "import sys; from whit.cli.app import run; sys.exit(run(sys.argv[1:]))"]
        command += ["quantize", "--no-verify", str(folder), "--recipe", f"gptq-{row}bit-g64", "-o", str(path)]
        run(*command, "--preset", "balanced", "--calib", "docs", "--windows", str(samples))
    return path


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
