"""What it costs to round every file for the original's second moments, instead of each on its own quantized prefix.

`python -m bench.shared_statistics MODEL q4_k_m gptq-4bit-g128 [--windows 24] [--held-out 16] [--preset fast]` writes
every recipe both ways from the same text with the same effort, and measures both on the same held-out windows.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from whit.calibration.text import WINDOW, default_text, windows
from whit.cli.calibration import calibration_for, longest
from whit.evaluation.compare import compare_states, final_states
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.folder import write_model
from whit.pipeline.observe import gather_statistics
from whit.pipeline.quantize import model_view, plan_gguf
from whit.pipeline.statistics import Statistics
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named


def main() -> None:
    """Print a row per recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--preset", default="fast")
    asked = parser.parse_args()
    model = open_model(asked.model)
    ids = load_tokenizer(model).encode(default_text().content)
    held_out = windows(ids, min(WINDOW, longest(model)), asked.held_out)
    original = final_states(model, held_out)
    own = calibration_for(model, asked.preset, "docs", asked.windows)
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        statistics = Statistics(Path(scratch) / "statistics")
        started = time.process_time()
        gather_statistics(
            model, model_view(model), plan_gguf(model, recipe_named("f32")).steps, own.windows, statistics
        )
        print(f"one pass: {time.process_time() - started:.0f} CPU s", flush=True)
        print("| recipe | KL, a pass of its own | KL, shared moments | ratio |\n|---|---|---|---|", flush=True)
        for name in asked.recipes:
            recipe = folder_recipe(name, "feedback") or recipe_named(name, "feedback")
            found = []
            for calibration in (own, replace(own, statistics=statistics)):
                out = Path(scratch) / ("out.gguf" if recipe.layout == "gguf" else "out")
                write_model(model, recipe, out, calibration=calibration)
                found.append(compare_states(final_states(open_model(out), held_out), original, held_out))
                shutil.rmtree(out) if out.is_dir() else out.unlink()
            values = [f"{each.kl_mean:.5f} ± {each.kl_mean_se:.5f}" for each in found]
            print(f"| {name} | {' | '.join(values)} | {found[1].kl_mean / found[0].kl_mean:.3f} |", flush=True)


if __name__ == "__main__":
    main()
