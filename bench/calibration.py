"""Which text to calibrate on: documentation beside text that the model writes itself, on two texts that neither holds.

`python -m bench.calibration TEXT [--recipe q4_0] [--preset fast]`: TEXT is a file of another kind of prose.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from bench.peers import WORK
from whit.calibration.text import default_text, read_text, windows
from whit.cli.calibration import DOCUMENTATION, MIXED, SAMPLED, calibration_for
from whit.evaluation.compare import compare_states, final_states
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named

REPORT = 12  # windows of each text


def main() -> None:
    """Print a row per calibration text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="q4_0")
    parser.add_argument("--preset", default="fast")
    arguments = parser.parse_args()
    model = open_model(arguments.model)
    tokenizer, file = load_tokenizer(model), WORK / "calibration.gguf"
    texts = [default_text().content, read_text(Path(arguments.text)).content]
    reported = [windows(tokenizer.encode(text), limit=REPORT) for text in texts]
    references = [final_states(model, ids) for ids in reported]
    print("| calibrated on | KL, documentation held out | KL, other text | seconds for the text |\n|---|---|---|---|")
    for name in (DOCUMENTATION, SAMPLED, MIXED):
        started = time.perf_counter()
        calibration = calibration_for(model, arguments.preset, name)
        seconds = time.perf_counter() - started
        write_gguf(model, recipe_named(arguments.recipe, "feedback"), file, overwrite=True, calibration=calibration)
        cells = []
        for ids, reference in zip(reported, references, strict=True):
            found = compare_states(final_states(open_model(str(file)), ids), reference, ids)
            cells.append(f"{found.kl_mean:.5f} ± {found.kl_mean_se:.5f}")
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)
    file.unlink()


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
