"""Time and memory of plain quantization, against llama.cpp's own quantizer on the same float32 file."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from bench.measure import side_by_side
from bench.models import float_folder, float_gguf
from bench.peers import WORK, llama_cpp

THREADS = "2"


def main() -> None:
    """Print one table."""
    whit = Path(sys.executable).with_name("whit")
    source, folder, out = float_gguf(), float_folder(), WORK / "out.gguf"
    print("| recipe | llama.cpp, f32 GGUF | Whit, f32 GGUF | ratio | Whit, f32 folder | ratio | peak RSS: llama.cpp | Whit |")
    print("|---|---|---|---|---|---|---|---|")
    for recipe in ("q8_0", "q4_0", "f16"):
        quantize = (whit, "quantize", "--recipe", recipe, "-o", out)
        commands = {
            "llama.cpp": (llama_cpp("llama-quantize"), source, out, recipe.upper(), THREADS),
            "gguf": (*quantize, source),
            "folder": (*quantize, folder),
        }
        runs = side_by_side(commands, [out], repeats=5)
        peer, gguf, from_folder = (runs[name] for name in commands)
        print(
            f"| {recipe} | {peer.seconds:.2f} s | {gguf.seconds:.2f} s | {gguf.seconds / peer.seconds:.2f} "
            f"| {from_folder.seconds:.2f} s | {from_folder.seconds / peer.seconds:.2f} | {peer.peak_bytes / 1e6:.0f} MB "
            f"| {max(gguf.peak_bytes, from_folder.peak_bytes) / 1e6:.0f} MB |",
            flush=True,
        )
    out.unlink(missing_ok=True)


if __name__ == "__main__":
    if shutil.disk_usage(Path(__file__).parent).free < 3e9:
        sys.exit("3 GB of free disk are needed")
    main()
