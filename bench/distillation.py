"""Allocation alone, distillation alone, both: `python -m bench.distillation [MODEL] [--recipe iq4_xs] [--steps 100]`.

The uniform recipe's size is the budget; distillation trains on documentation and on text that the model wrote, and
decides on other windows of both. KL on held-out text that none of it saw. All with the preset `fast`, so that what is
left alone is calibrated rounding.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from bench.peers import WORK
from whit.calibration.text import default_text, documentation_text, windows
from whit.evaluation.compare import compare_states, final_states
from whit.models.open import open_model
from whit.models.sampling import sampled_windows
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.allocate import Allocator
from whit.pipeline.distil import Training, distil_gguf
from whit.pipeline.effort import PRESETS, Calibration
from whit.pipeline.quantize import write_gguf
from whit.pipeline.sensitivity import sensitivities
from whit.recipes.named import recipe_named

REPORTED, READ, SWEPT = 24, 8, 8
TRAINED, DECIDED = 32, 4  # windows of each text


def main() -> None:
    """One row per file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--recipe", default="iq4_xs")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    model, name, preset = open_model(arguments.model), Path(arguments.model).name, PRESETS["fast"]
    tokenizer = load_tokenizer(model)
    docs = windows(tokenizer.encode(documentation_text("calibration").content))
    sampled = sampled_windows(model, TRAINED + DECIDED, docs.shape[1])
    train = torch.cat([docs[READ : READ + TRAINED], sampled[DECIDED:]])
    held = torch.cat([docs[-DECIDED:], sampled[:DECIDED]])
    calibration = Calibration(docs[:READ], preset.strength, preset.effort)
    ids = windows(tokenizer.encode(default_text().content), limit=REPORTED)
    reference = final_states(model, ids)
    print(
        "| file | bytes | KL | same top | perplexity | steps kept | seconds |\n|---|---|---|---|---|---|---|",
        flush=True,
    )

    def row(label: str, path: Path, steps: int, started: float) -> None:
        seconds, found = (
            time.perf_counter() - started,
            compare_states(final_states(open_model(path), ids), reference, ids),
        )
        print(
            f"| {label} | {path.stat().st_size:,} | {found.kl_mean:.5f} ± {found.kl_mean_se:.5f} | "
            f"{found.same_top:.3f} | {found.perplexity:.3f} | {steps} | {seconds:.0f} |",
            flush=True,
        )

    def both_ways(label: str, path: Path) -> None:
        row(label, path, 0, started)
        out, again = path.with_suffix(".distilled.gguf"), time.perf_counter()
        training = Training(arguments.steps)
        found = distil_gguf(model, open_model(path), out, train, held, training, overwrite=True)
        row(f"{label} and distilled", out, found.steps, again)

    started, path = time.perf_counter(), WORK / f"uniform.{name}.gguf"
    recipe = recipe_named(arguments.recipe, "feedback")
    size = write_gguf(model, recipe, path, overwrite=True, calibration=calibration).n_bytes
    both_ways(f"uniform {arguments.recipe}", path)
    started, path = time.perf_counter(), WORK / f"allocated.{name}.gguf"
    allocator = Allocator(model)
    allocation = allocator.fit(sensitivities(model, allocator.candidates, docs[:SWEPT]), size)
    write_gguf(model, allocation.recipe, path, overwrite=True, calibration=calibration)
    both_ways("allocated", path)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
