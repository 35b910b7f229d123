"""`python -m bench.tuned START ORIGINAL TOKENS OUT`: train a quantized file on given windows, nothing else.

TOKENS is a safetensors file with `tokens` [n, length]; some windows are kept apart to decide on, and the original
draws tokens of the others anew, as the command does.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from whit.cli.calibration import shared_out
from whit.cli.tune import RESAMPLED
from whit.models.open import open_model
from whit.models.sampling import resampled_windows
from whit.tune.files import tune_file
from whit.tune.train import Tuning


def main() -> None:
    """What came of it as JSON."""
    parser = argparse.ArgumentParser()
    for name in ("start", "original", "tokens", "out"):
        parser.add_argument(name)
    parser.add_argument("--train", default="full")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--block-steps", type=int, default=480)
    parser.add_argument("--block-batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.03)
    parser.add_argument("--scale-rate", type=float, default=1e-3)
    parser.add_argument("--resampled", type=int, default=RESAMPLED)
    arguments = parser.parse_args()
    held_out, windows = shared_out(load_file(arguments.tokens)["tokens"])
    tuning = Tuning(
        train=arguments.train,
        steps=arguments.steps,
        batch=arguments.batch,
        block_steps=arguments.block_steps,
        block_batch=arguments.block_batch,
        rate=arguments.rate,
        scale_rate=arguments.scale_rate,
    )
    original = open_model(arguments.original)
    if arguments.resampled:
        windows = torch.cat([windows, resampled_windows(original, windows, arguments.resampled)])
    start, out = open_model(arguments.start), Path(arguments.out)
    found = tune_file(
        start, out, windows, held_out, original, tuning, True, lambda *said: print(*said, file=sys.stderr)
    )
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
