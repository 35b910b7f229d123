"""The same type for every tensor, the same bytes, the same calibration text: Whit beside llama.cpp's importance matrix.

`python -m bench.importance [MODEL] [--recipes ...] [--preset ...]`. The importance matrix is made by llama.cpp's own
tool from as many windows as Whit reads. Both files are measured by the same evaluator, on text that neither saw.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from bench.measure import run
from bench.peers import WORK, llama_cpp
from bench.runtime import Runtime
from whit.calibration.text import default_text, documentation_text, windows
from whit.checkpoints.gguf import GGUFFile
from whit.evaluation.compare import compare_states, final_states
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.effort import DEFAULT_PRESET, PRESETS, Calibration
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named

WINDOWS = 24
RECIPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "iq4_xs", "q4_0", "q3_k_m", "q2_k")


def main() -> None:
    """Print a row per recipe as it is measured and write them to bench/work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--runtime", nargs="*", default=(), help="recipes to measure with llama.cpp's own tool too")
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=PRESETS)
    arguments = parser.parse_args()
    name, preset = Path(arguments.model).name, PRESETS[arguments.preset]
    model = open_model(arguments.model)
    tokenizer = load_tokenizer(model)
    text = documentation_text("calibration").content
    calibration = Calibration(windows(tokenizer.encode(text), limit=preset.windows), preset.strength, preset.effort)
    ids = windows(tokenizer.encode(default_text().content), limit=WINDOWS)
    source = WORK / f"{name}-f32.gguf"
    if not source.exists():
        write_gguf(model, recipe_named("f32"), source)
    matrix = importance_of(source, name, text, len(calibration.windows))
    reference = final_states(model, ids)
    print(f"{name}: {len(ids)} windows of 512 tokens of {default_text().description}; preset {arguments.preset}.\n")
    print(
        "| recipe | MB | llama.cpp, importance matrix | Whit | ratio | same top | perplexity | seconds | same types |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows, inside = [], []
    runtime = Runtime(source, WINDOWS) if arguments.runtime else None
    for recipe in arguments.recipes:
        peer, ours = WORK / f"peer.{name}.gguf", WORK / f"whit.{name}.gguf"
        run(llama_cpp("llama-quantize"), "--imatrix", matrix, source, peer, recipe.upper(), "2")
        started = time.perf_counter()
        write_gguf(model, recipe_named(recipe, "feedback"), ours, overwrite=True, calibration=calibration)
        seconds = time.perf_counter() - started
        theirs, mine = (compare_states(final_states(open_model(str(f)), ids), reference, ids) for f in (peer, ours))
        first, second = ({n: GGUFFile(f).info(n).dtype for n in GGUFFile(f).names()} for f in (peer, ours))
        other = sum(second.get(n) != kind for n, kind in first.items())
        ratio, size = mine.kl_mean / theirs.kl_mean, ours.stat().st_size
        print(
            f"| {recipe} | {size / 1e6:.1f} | {theirs.kl_mean:.5f} ± {theirs.kl_mean_se:.5f} | {mine.kl_mean:.5f} ± "
            f"{mine.kl_mean_se:.5f} | {ratio:.2f} | {theirs.same_top:.3f} / {mine.same_top:.3f} | "
            f"{theirs.perplexity:.3f} / {mine.perplexity:.3f} ({mine.perplexity_reference:.3f}) | {seconds:.0f} | "
            f"{'yes' if not other else f'{other} differ'} |",
            flush=True,
        )
        rows.append({"recipe": recipe, "bytes": size, "llama.cpp": theirs.kl_mean, "whit": mine.kl_mean})
        if runtime and recipe in arguments.runtime:
            first_kl, second_kl = (runtime.of(f)["kl"] for f in (peer, ours))
            inside.append(f"| {recipe} | {first_kl} | {second_kl} | {float(second_kl) / float(first_kl):.2f} |")
        peer.unlink(), ours.unlink()
    if runtime:
        runtime.close()
        print("\nKL in llama.cpp's own tool, which rounds activations to 8 bits as well:\n")
        print("\n".join(("| recipe | llama.cpp | Whit | ratio |", "|---|---|---|---|", *inside)))
    (WORK / f"importance-{name}.json").write_text(json.dumps(rows, indent=1))


def importance_of(source: Path, name: str, text: str, n_windows: int) -> Path:
    """llama.cpp's importance matrix of a model on the first windows of a text, made when it is not there."""
    matrix, file = WORK / f"{name}-{n_windows}.imatrix", WORK / "calibration.txt"
    if not matrix.exists():
        file.write_text(text)
        options = ("-c", "512", "-b", "512", "--chunks", str(n_windows), "-t", "2")
        run(llama_cpp("llama-imatrix"), "-m", source, "-f", file, "-o", matrix, *options)
    return matrix


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
