"""Does Whit's evaluation say what llama.cpp's perplexity tool says? Same file, same text, same windows."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from bench.measure import run
from bench.models import float_gguf
from bench.peers import WORK, llama_cpp
from whit.calibration.text import default_text

WINDOWS = 16


def main() -> None:
    """Print perplexity, divergence and agreement of q8_0 and q4_0 as both programs measure them."""
    whit = Path(sys.executable).with_name("whit")
    tool, source = llama_cpp("llama-perplexity"), float_gguf()
    text = WORK / "held-out.txt"
    text.write_text(default_text().content, encoding="utf-8")
    common = ("-f", text, "-c", "512", "-b", "512", "--chunks", str(WINDOWS), "-t", "2")
    logits = WORK / "logits.bin"
    original = run(tool, "-m", source, *common, "--kl-divergence-base", logits)
    print(f"{WINDOWS} windows of 512 tokens of {default_text().description}.\n")
    print("| file | perplexity: llama.cpp | Whit | mean KL: llama.cpp | Whit | same top: llama.cpp | Whit |")
    print("|---|---|---|---|---|---|---|", flush=True)
    peer_ppl = float(_found(r"Final estimate: PPL = ([\d.]+)", original.output))
    for recipe in ("f32", "q8_0", "q4_0"):
        path = source if recipe == "f32" else WORK / f"{recipe}.gguf"
        if recipe != "f32":
            run(whit, "quantize", source, "--recipe", recipe, "--rounding", "nearest", "-o", path, "--force")
        ours = json.loads(
            run(whit, "eval", path, "--against", source, "--text", text, "--windows", str(WINDOWS), "--json").output
        )
        peer = [f"{peer_ppl:.4f}", "0", "100 %"]
        if recipe != "f32":
            output = run(tool, "-m", path, *common, "--kl-divergence-base", logits, "--kl-divergence").output
            peer = [
                _found(r"Mean PPL\(Q\) *: *([\d.]+)", output),
                _found(r"Mean +KLD: *([\d.]+)", output),
                _found(r"Same top p: *([\d.]+)", output) + " %",
            ]
        print(
            f"| {recipe} | {peer[0]} | {ours['perplexity']:.4f} | {peer[1]} | {ours['kl_mean']:.6f} "
            f"| {peer[2]} | {100 * ours['same_top']:.3f} % |",
            flush=True,
        )
    logits.unlink()


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{pattern!r} is not in the output:\n{text[-2000:]}")
    return found[1]


if __name__ == "__main__":
    main()
