"""Time and memory of plain quantization, against llama.cpp's own quantizer on the same float32 file.

Whole commands are compared, and the conversions alone as each program reports them: a Python process spends most of a
short command on loading torch, which a larger model does not pay again.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bench.measure import run, side_by_side
from bench.models import float_folder, float_gguf, wide_gguf
from bench.peers import WORK, llama_cpp

THREADS = "2"
LAYERS = 16  # of the larger model


def main() -> None:
    """Print one table, and the cost of loading torch."""
    whit = Path(sys.executable).with_name("whit")
    source, folder, out = float_gguf(), float_folder(), WORK / "out.gguf"
    print(
        "| recipe | whole command: llama.cpp | Whit, GGUF | Whit, folder | ratio | conversion alone: llama.cpp | Whit |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    peaks: dict[str, int] = {}
    for recipe in ("q8_0", "q4_0", "f16"):
        quantize = (whit, "quantize", "--no-verify", "--recipe", recipe, "--rounding", "nearest", "-o", out)
        commands = {
            "llama.cpp": (llama_cpp("llama-quantize"), source, out, recipe.upper(), THREADS),
            "gguf": (*quantize, source),
            "folder": (*quantize, folder),
        }
        runs = side_by_side(commands, [out], repeats=5)
        peer, gguf, from_folder = (runs[name] for name in commands)
        peaks |= {f"{name}, {recipe}": one.peak_bytes for name, one in runs.items()}
        inside = _number(r"total time = +([\d.]+) ms", peer.output) / 1000
        ours = _number(r"([\d.]+) s$", gguf.output)
        ratio = gguf.seconds / peer.seconds
        print(
            f"| {recipe} | {peer.seconds:.2f} s | {gguf.seconds:.2f} s | {from_folder.seconds:.2f} s | {ratio:.1f} "
            f"| {inside:.2f} s | {ours:.2f} s |",
            flush=True,
        )
    out.unlink(missing_ok=True)
    torch = min(run(sys.executable, "-c", "import torch").seconds for _ in range(5))
    print(f"\n`import torch` alone: {torch:.2f} s.")
    source = wide_gguf(LAYERS)
    commands = {
        "llama.cpp": (llama_cpp("llama-quantize"), source, out, "Q8_0", THREADS),
        "whit": (whit, "quantize", "--no-verify", "--recipe", "q8_0", "--rounding", "nearest", "-o", out, source),
    }
    runs = side_by_side(commands, [out], repeats=3)
    peer, ours = (runs[name].seconds for name in commands)
    size = source.stat().st_size / 1e9
    out.unlink(missing_ok=True)
    print(f"A file of {size:.1f} GB to q8_0: llama.cpp {peer:.2f} s, Whit {ours:.2f} s, ratio {ours / peer:.1f}.")
    print("Peak resident memory: " + "; ".join(f"{name} {n / 1e6:.0f} MB" for name, n in peaks.items()) + ".")


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{pattern!r} is not in the output:\n{text[-2000:]}")
    return float(found[1])


if __name__ == "__main__":
    main()
