"""Does Whit's evaluation say what llama.cpp's perplexity tool says? Same file, same text, same windows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.measure import run
from bench.models import float_gguf
from bench.peers import WORK
from bench.runtime import Runtime
from whit.calibration.text import default_text

WINDOWS = 16


def main() -> None:
    """Print perplexity, divergence and agreement of q8_0 and q4_0 as both programs measure them."""
    whit = Path(sys.executable).with_name("whit")
    source = float_gguf()
    runtime = Runtime(source, WINDOWS)
    print(f"{WINDOWS} windows of 512 tokens of {default_text().description}.\n")
    print("| file | perplexity: llama.cpp | Whit | mean KL: llama.cpp | Whit | same top: llama.cpp | Whit |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for recipe in ("f32", "q8_0", "q4_0"):
        path = source if recipe == "f32" else WORK / f"{recipe}.gguf"
        if recipe != "f32":
            run(
                whit,
                "quantize",
                "--no-verify",
                source,
                "--recipe",
                recipe,
                "--rounding",
                "nearest",
                "-o",
                path,
                "--force",
            )
        command = (whit, "eval", path, "--against", source, "--text", runtime.text, "--windows", str(WINDOWS), "--json")
        ours = json.loads(run(*command).output)
        peer = [runtime.perplexity, "0", "100 %"]
        if recipe != "f32":
            found = runtime.of(path)
            peer = [found["perplexity"], found["kl"], found["same_top"] + " %"]
        print(
            f"| {recipe} | {peer[0]} | {ours['perplexity']:.4f} | {peer[1]} | {ours['kl_mean']:.6f} "
            f"| {peer[2]} | {100 * ours['same_top']:.3f} % |",
            flush=True,
        )
    runtime.close()


if __name__ == "__main__":
    main()
