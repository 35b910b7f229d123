"""The comparison of GPTQ's and AWQ's papers at 4, 3 and 2 bits: `python -m bench.methods [MODEL] [--group 64]`.

Plain rounding, GPTQ as published (feedback, scales of the range), AWQ (columns rescaled, then plain rounding) and the
whole, all in groups, symmetric, in the same layout at the same bytes. AWQ is the search for factors that Whit has,
which tries more of them than the paper. Calibration and report text do not overlap.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from bench.peers import WORK
from whit.calibration.text import default_text, documentation_text, windows
from whit.evaluation.compare import compare_states, final_states
from whit.grids.grid import Adaptive
from whit.grids.quantized import QuantizedTensor
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.effort import PRESETS, Calibration
from whit.pipeline.folder import FolderJob
from whit.recipes.folders import folder_recipe
from whit.rounding import methods
from whit.rounding.curvature import Curvature
from whit.rounding.methods import FLOORED, Effort
from whit.rounding.nearest import nearest

BARE = Effort(sweeps=0, late=False, rescale=False)
METHODS = {
    "RTN": ("nearest", BARE),
    "GPTQ as published": ("gptq", BARE),
    "AWQ": (FLOORED, Effort(sweeps=0, rescale=True)),
    "Whit, `fast`": (FLOORED, PRESETS["fast"].effort),
    "Whit, `balanced`": (FLOORED, PRESETS["balanced"].effort),
}


def main() -> None:
    """One row per number of bits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="*", default=(4, 3, 2))
    parser.add_argument("--read", type=int, default=32, help="calibration windows")
    parser.add_argument("--reported", type=int, default=24, help="windows of held-out text")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, out = open_model(arguments.model), WORK / "methods"
    tokenizer = load_tokenizer(model)
    read = windows(tokenizer.encode(documentation_text("calibration").content), limit=arguments.read)
    ids = windows(tokenizer.encode(default_text().content), limit=arguments.reported)
    reference = final_states(model, ids)
    print(
        f"{Path(arguments.model).name}, groups of {arguments.group}: {len(read)} windows read, {len(ids)} reported.\n"
    )
    print(f"| bits | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}", flush=True)
    for bits in arguments.bits:
        cells = []
        for label, (rounding, effort) in METHODS.items():
            recipe = folder_recipe(f"gptq-{bits}bit-g{arguments.group}", rounding)
            assert recipe is not None
            changed = patch.dict(methods.METHODS, {FLOORED: _plain}) if label == "AWQ" else nullcontext()
            with changed:
                FolderJob(model, recipe).write(out, overwrite=True, calibration=Calibration(read, 0.0, effort))
            found = compare_states(final_states(open_model(out), ids), reference, ids)
            cells.append(f"{found.kl_mean:.4f} ± {found.kl_mean_se:.4f} ({found.perplexity:.2f})")
        print(f"| {bits} | {' | '.join(cells)} |", flush=True)


def _plain(W: Tensor, grid: Adaptive, c: Curvature, effort: Effort, F: Tensor | None = None) -> QuantizedTensor:
    return nearest(W, grid)


if __name__ == "__main__":
    main()
