"""26 budgets from 2.5 to 8.5 bits per weight: predicted bytes against the file's, and divergence as it is measured.

`python -m bench.sizes [MODEL] [--preset ...]`. A budget below the smallest file that is possible is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.peers import WORK
from whit.calibration.text import default_text, documentation_text, windows
from whit.evaluation.compare import compare_states, final_states
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.allocate import Allocator
from whit.pipeline.effort import PRESETS, Calibration
from whit.pipeline.quantize import write_gguf
from whit.pipeline.sensitivity import sensitivities

BUDGETS, FROM, TO = 26, 2.5, 8.5
WINDOWS, SWEPT = 12, 8


def main() -> None:
    """Print a row per budget, then how often a larger one lost more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=str(WORK / "small-512"))
    parser.add_argument("--preset", default="fast", choices=PRESETS)
    arguments = parser.parse_args()
    preset, model = PRESETS[arguments.preset], open_model(arguments.model)
    tokenizer = load_tokenizer(model)
    docs = windows(tokenizer.encode(documentation_text("calibration").content), limit=preset.windows)
    calibration = Calibration(docs, preset.strength, preset.effort)
    ids = windows(tokenizer.encode(default_text().content), limit=WINDOWS)
    reference, allocator = final_states(model, ids), Allocator(model)
    damages = sensitivities(model, allocator.candidates, docs[:SWEPT])
    out, last, rises, wrong = WORK / "sizes.gguf", float("inf"), 0, 0
    print(f"{Path(arguments.model).name}, preset {arguments.preset}\n")
    print(
        "| bits asked | bytes allowed | predicted | written | KL predicted | KL measured |\n|---|---|---|---|---|---|"
    )
    for i in range(BUDGETS):
        bits = FROM + (TO - FROM) * i / (BUDGETS - 1)
        budget = int(bits * allocator.n_weights / 8)
        if budget < allocator.least:
            print(f"| {bits:.2f} | {budget:,} | refused: the smallest file has {allocator.least:,} | | | |", flush=True)
            continue
        found = allocator.fit(damages, budget)
        write_gguf(model, found.recipe, out, overwrite=True, calibration=calibration)
        written = out.stat().st_size
        lost = compare_states(final_states(open_model(out), ids), reference, ids)
        wrong += written != found.n_bytes or written > budget
        rises += lost.kl_mean > last
        last = lost.kl_mean
        print(
            f"| {bits:.2f} | {budget:,} | {found.n_bytes:,} | {written:,} | {found.damage:.5f} | {lost.kl_mean:.5f} ± "
            f"{lost.kl_mean_se:.5f} |",
            flush=True,
        )
    out.unlink(missing_ok=True)
    print(f"\n{wrong} sizes were not as predicted; {rises} times a larger budget lost more.")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
