"""Equal bytes: Whit's allocation beside the best file of llama.cpp with an importance matrix that is no larger.

`python -m bench.budget [MODEL] [--preset ...] [--distil STEPS] [--sizes ...]`. llama.cpp writes every type that it
offers; at the size of each of its files in `--sizes` the rival is its best file of at most that size. The importance
matrix and Whit's calibration come from the same text; distillation also reads text that the model wrote. All are
measured on text that none of them saw.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from bench.importance import importance_of
from bench.measure import run
from bench.peers import WORK, llama_cpp
from bench.runtime import Runtime
from whit.calibration.text import default_text, documentation_text, windows
from whit.evaluation.compare import compare_states, final_states
from whit.evaluation.divergence import Comparison
from whit.models.open import open_model
from whit.models.sampling import sampled_windows
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.allocate import Allocator
from whit.pipeline.distil import Training, distil_gguf
from whit.pipeline.effort import PRESETS, Calibration
from whit.pipeline.quantize import write_gguf
from whit.pipeline.sensitivity import sensitivities
from whit.recipes.named import recipe_named

WINDOWS = 24
SWEPT = 8
TYPES = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
    *("Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M"),
    *("Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
)
SIZES = ("IQ2_M", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_K_M", "Q5_K_M", "Q6_K")


def main() -> None:
    """Print both tables and write all points to bench/work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--preset", default="fast", choices=PRESETS)
    parser.add_argument("--distil", type=int, default=0)
    parser.add_argument("--sizes", nargs="*", default=SIZES)
    parser.add_argument("--runtime", nargs="*", default=(), help="sizes to measure with llama.cpp's own tool too")
    arguments = parser.parse_args()
    name, preset = Path(arguments.model).name, PRESETS[arguments.preset]
    model = open_model(arguments.model)
    tokenizer = load_tokenizer(model)
    text = documentation_text("calibration").content
    docs = windows(tokenizer.encode(text))
    calibration = Calibration(docs[: preset.windows], preset.strength, preset.effort)
    ids = windows(tokenizer.encode(default_text().content), limit=WINDOWS)
    reference = final_states(model, ids)
    source = WORK / f"{name}-f32.gguf"
    if not source.exists():
        write_gguf(model, recipe_named("f32"), source)
    matrix = importance_of(source, name, text, preset.windows)

    def measured(path: Path) -> Comparison:
        return compare_states(final_states(open_model(path), ids), reference, ids)

    print(f"{name}: {len(ids)} windows of 512 tokens of {default_text().description}; preset {arguments.preset}.\n")
    print("| llama.cpp | bytes | KL | same top | perplexity |\n|---|---|---|---|---|", flush=True)
    rivals: list[tuple[int, str, Comparison]] = []
    for kind in TYPES:
        path = WORK / f"rival.{name}.{kind}.gguf"
        run(llama_cpp("llama-quantize"), "--imatrix", matrix, source, path, kind, "2")
        found = measured(path)
        rivals.append((path.stat().st_size, kind, found))
        print(f"| {kind} | {path.stat().st_size:,} | {_row(found)} |", flush=True)
        if kind not in arguments.sizes:
            path.unlink()
    started = time.perf_counter()
    allocator = Allocator(model)
    damages = sensitivities(model, allocator.candidates, calibration.windows[:SWEPT])
    print(f"\nSensitivities: {time.perf_counter() - started:.0f} s.\n")
    print("| at the size of | bytes | rival, its KL | Whit, bytes | KL | ratio | same top | perplexity | seconds |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    rows, inside = [], []
    runtime = Runtime(source, WINDOWS) if arguments.runtime else None
    sampled = sampled_windows(model, 36, 512) if arguments.distil else docs[:0]
    for kind in arguments.sizes:
        size = next(size for size, each, _ in rivals if each == kind)
        best = min((each for each in rivals if each[0] <= size), key=lambda each: each[2].kl_mean)
        path, started = WORK / f"whit.{name}.gguf", time.perf_counter()
        allocation = allocator.fit(damages, size)
        result = write_gguf(model, allocation.recipe, path, overwrite=True, calibration=calibration)
        if arguments.distil:
            plain, path = path, WORK / f"distilled.{name}.gguf"
            n = preset.windows
            train, held = torch.cat([docs[n : n + 32], sampled[4:]]), torch.cat([docs[-4:], sampled[:4]])
            distil_gguf(model, open_model(plain), path, train, held, Training(arguments.distil), overwrite=True)
        seconds, mine = time.perf_counter() - started, measured(path)
        ratio = mine.kl_mean / best[2].kl_mean
        print(
            f"| {kind} | {size:,} | {best[1]}, {best[2].kl_mean:.5f} | {result.n_bytes:,} | {mine.kl_mean:.5f} ± "
            f"{mine.kl_mean_se:.5f} | {ratio:.2f} | {best[2].same_top:.3f} / {mine.same_top:.3f} | "
            f"{best[2].perplexity:.3f} / {mine.perplexity:.3f} ({mine.perplexity_reference:.3f}) | {seconds:.0f} |",
            flush=True,
        )
        row = {"size": kind, "bytes": result.n_bytes, "whit": mine.kl_mean, "predicted": allocation.damage}
        rows.append({**row, "rival": best[1], "rival_kl": best[2].kl_mean})
        if runtime and kind in arguments.runtime:
            theirs = runtime.of(WORK / f"rival.{name}.{best[1]}.gguf") if best[1] in arguments.sizes else None
            ours = runtime.of(path)
            inside.append(f"| {kind} | {best[1]} | {theirs['kl'] if theirs else '-'} | {ours['kl']} |")
    if runtime:
        runtime.close()
        print("\nIn llama.cpp's own tool:\n\n| at the size of | rival | its KL | Whit |\n|---|---|---|---|")
        print("\n".join(inside))
    points = [{"by": "llama.cpp", "name": kind, "bytes": size, "kl": each.kl_mean} for size, kind, each in rivals]
    points += [{"by": "Whit", "name": row["size"], "bytes": row["bytes"], "kl": row["whit"]} for row in rows]
    label = f"{name}-distil" if arguments.distil else name
    (WORK / f"budget-{label}.json").write_text(json.dumps({"rows": rows, "points": points}, indent=1))


def _row(found: Comparison) -> str:
    return f"{found.kl_mean:.5f} ± {found.kl_mean_se:.5f} | {found.same_top:.3f} | {found.perplexity:.3f}"


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
