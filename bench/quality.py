"""What every recipe loses, by Whit and by llama.cpp's quantizer at the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bench.measure import run
from bench.models import MODEL, float_gguf
from bench.peers import WORK, llama_cpp
from whit.calibration.text import default_text, windows
from whit.checkpoints.gguf import GGUFFile
from whit.evaluation.compare import compare_states, final_states
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named

WINDOWS = 16
RECIPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


def main() -> None:
    """Print one table and write bench/work/quality.json."""
    model = open_model(MODEL)
    ids = windows(load_tokenizer(model).encode(default_text().content), limit=WINDOWS)
    reference = final_states(model, ids)
    print(f"{WINDOWS} windows of 512 tokens of {default_text().description}; mean KL in nats ± its standard error.\n")
    print("| recipe | MB | llama.cpp | Whit, nearest | Whit, search | same bytes as llama.cpp's |")
    print("|---|---|---|---|---|---|", flush=True)
    points = []
    for recipe in RECIPES:
        files = {"llama.cpp": WORK / f"peer.{recipe}.gguf"}
        run(llama_cpp("llama-quantize"), float_gguf(), files["llama.cpp"], recipe.upper(), "2")
        for rounding in ("nearest", "search"):
            files[rounding] = WORK / f"{rounding}.{recipe}.gguf"
            write_gguf(model, recipe_named(recipe, rounding), files[rounding], overwrite=True)
        same = _same(files["llama.cpp"], files["nearest"])
        cells = []
        for name, path in files.items():
            if name == "nearest" and same:
                cells.append(cells[0])
                points.append({**points[-1], "by": name})
                continue
            result = compare_states(final_states(open_model(path), ids), reference, ids)
            cells.append(f"{result.kl_mean:.4f} ± {result.kl_mean_se:.4f}")
            size = path.stat().st_size
            points.append({"recipe": recipe, "by": name, "bytes": size, "kl": result.kl_mean, "se": result.kl_mean_se})
        size = files["nearest"].stat().st_size / 1e6
        print(f"| {recipe} | {size:.1f} | {' | '.join(cells)} | {'every tensor' if same else 'no'} |", flush=True)
        for path in files.values():
            path.unlink()
    (WORK / "quality.json").write_text(json.dumps(points, indent=1))


def _same(first: Path, second: Path) -> bool:
    a, b = GGUFFile(first), GGUFFile(second)
    return all(torch.equal(a.raw(name), b.raw(name)) for name in a.names())


if __name__ == "__main__":
    main()
