"""Speed of the kernels beside llama.cpp's, ONNX Runtime's and torch's: `python -m bench.kernels [--tables]`.

Every round runs all of them, one after the other, so that whatever else the machine does falls on all. Each process
multiplies with matrices that come from memory (600 MB of copies in turn), or with `--warm` always with the same one.
A time is the best pass of ggml and ONNX Runtime (whole graphs of many products), and of the others the median of
single calls, the smallest over the rounds. Peers are installed and built on first use. `--tables` compares tables of
rows, groups and matrices, of 2 to 8 bits and with outliers, with each other and with decoding first; no peer has them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import venv
from collections import defaultdict
from pathlib import Path

from bench import peers
from bench.peers import WORK

SCRIPTS = Path(__file__).parent / "peer_scripts"
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
COLD_BYTES = 6e8
MANY = 64  # rows of x from which arithmetic decides, and one matrix will do
# What is compared with what: ours, and the fastest of these.
CLAIMS = {
    "int4 against llama.cpp Q4_K": (("whit-q4_0-int8",), ("ggml-q4_K",)),
    "int4 against llama.cpp Q4_0": (("whit-q4_0-int8",), ("ggml-q4_0",)),
    "int4-g32 against ONNX Runtime": (("whit-q4_0-int8",), ("ort-int4-g32-int8",)),
    "int4-g128 against ONNX Runtime": (("whit-int4-g128-int8",), ("ort-int4-g128-int8",)),
    "int4-g128, x in floats, against ONNX Runtime": (("whit-int4-g128-f32",), ("ort-int4-g128-f32",)),
    "int4-g128, x in bfloat16, against torch": (("whit-int4-g128-bf16",), ("torch-int4pack-g128",)),
    "int4-g128 against torch's dynamic int4": (("whit-int4-g128-int8",), ("torch-dyn4-g128",)),
    "int8 against torch's best int8": (
        ("whit-int8-int8", "whit-int8-bf16"), ("torch-int8pack", "torch-int8-dynamic"),
    ),
    "int8 against bfloat16": (("whit-int8-bf16",), ("torch-bf16",)),
    "int4-g128 against bfloat16": (("whit-int4-g128-bf16",), ("torch-bf16",)),
    "int4-g128, x in int8, against bfloat16": (("whit-int4-g128-int8",), ("torch-bf16",)),
    "int8, x in int8, against bfloat16": (("whit-int8-int8",), ("torch-bf16",)),
}  # fmt: skip


def ggml_program() -> Path:
    """The timing program, linked with ggml's own libraries, which are built for this machine."""
    cmake, source = peers._cmake(), peers._sources()
    build = source / "build-ggml"
    program = build / "bin" / "kernels_ggml"
    if not program.exists():
        options = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF")
        options += ("-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_SERVER=OFF")
        _quiet(cmake, "-S", source, "-B", build, *options)
        _quiet(cmake, "--build", build, "-j2", "-t", "ggml")
        libraries = ("-L", build / "bin", "-lggml", "-lggml-cpu", "-lggml-base", "-Wl,-rpath,$ORIGIN")
        _quiet("g++", "-O2", "-I", source / "ggml/include", SCRIPTS / "kernels_ggml.cpp", "-o", program, *libraries)
    return program


def read_program() -> Path:
    """How fast this machine reads memory."""
    program = WORK / "kernels_read"
    if not program.exists():
        WORK.mkdir(exist_ok=True)
        _quiet("g++", "-O2", "-march=native", "-fopenmp", SCRIPTS / "kernels_read.cpp", "-o", program)
    return program


def ort_python() -> Path:
    """An environment with ONNX Runtime."""
    env = WORK / "ort-peer"
    if not (env / "bin" / "python").exists():
        venv.create(env, with_pip=True)
    python = env / "bin" / "python"
    if subprocess.run([python, "-c", "import onnx, onnxruntime"], capture_output=True).returncode:
        _quiet(python, "-m", "pip", "install", "-q", "onnxruntime", "onnx", "numpy")
    return python


def _quiet(*command: str | Path) -> None:
    print("+", Path(command[0]).name, *command[1:3], "...", flush=True)
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lines_of(*command: str | Path | float) -> list[list[str]]:
    """What a program prints, in words."""
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return [line.split() for line in done.stdout.splitlines()]


def one_round(threads: int, rows: int, cols: int, m: int, n_bytes: float) -> dict[str, float]:
    """Seconds of a product by name; `ggml-*` is the best of its buffer types."""
    found: dict[str, list[float]] = defaultdict(list)
    numbers = (threads, rows, cols, m, n_bytes)
    for name, seconds in lines_of(sys.executable, SCRIPTS / "kernels_torch.py", *numbers):
        found[name].append(float(seconds))
    result = {name: statistics.median(seconds) for name, seconds in found.items()}
    for buffers in range(4):
        try:
            lines = lines_of(ggml_program(), *numbers, buffers)
        except subprocess.CalledProcessError as error:  # its AMX kernels die of an illegal instruction for some n
            print(f"  ggml with buffers of kind {buffers}: exit {error.returncode}")
            continue
        for kind, _, seconds in lines:
            result[f"ggml-{kind}"] = min(result.get(f"ggml-{kind}", 1e9), float(seconds))
    for name, text in lines_of(ort_python(), SCRIPTS / "kernels_ort.py", *numbers):
        result[name] = min(result.get(name, 1e9), float(text))
    return result


def measure(threads: int, rows: int, cols: int, m: int, n_bytes: float, rounds: int) -> dict[str, float]:
    """The smallest over the rounds."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, seconds in one_round(threads, rows, cols, m, n_bytes).items():
            best[name] = min(best.get(name, 1e9), seconds)
    return best


def tables(threads: int, rows: int, cols: int, m: int, n_bytes: float) -> None:
    """Medians of one process, beside decoding first and beside the table per row of 4 bits."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, seconds in lines_of(sys.executable, SCRIPTS / "kernels_tables.py", threads, rows, cols, m, n_bytes):
        found[name].append(float(seconds))
    times = {name: statistics.median(seconds) for name, seconds in found.items()}
    print(f"{rows} x {cols}, m = {m}, {threads} threads" + ("" if n_bytes else ", warm"))
    for name, seconds in times.items():
        ratios = [f"{times['kmeans4'] / seconds:5.2f} x kmeans4"]
        ratios += [f"{times[k] / seconds:6.1f} x {k}" for k in (f"decode-{name}", f"plain-{name}") if k in times]
        print(f"  {name:24s} {seconds * 1e6:10.0f} us  {'  '.join(ratios)}", flush=True)


def report(best: dict[str, float], bandwidth: float | None, shape: tuple[int, int]) -> None:
    """Times, then ratios, then the share of the memory's speed."""
    for name in sorted(best, key=lambda name: best[name]):
        print(f"  {name:24s} {best[name] * 1e6:10.0f} us")
    for claim, (ours, theirs) in CLAIMS.items():
        mine = [best[name] for name in ours if name in best]
        others = [best[name] for name in theirs if name in best]
        if mine and others:
            print(f"  {claim:48s} {min(others) / min(mine):5.2f} x")
    if bandwidth is not None:
        bits = {"q4_0": 4.5, "int4-g128": 4.125, "int8": 8.0, "q8_0": 8.5, "int3-g64": 3.25, "int2-g64": 2.25}
        for name, seconds in best.items():
            grid = name.removeprefix("whit-").rpartition("-")[0]
            if name.startswith("whit-") and grid in bits:
                speed = shape[0] * shape[1] * bits[grid] / 8 / seconds
                print(f"  {name:24s} {speed / 1e9:5.1f} GB/s, {speed / bandwidth:4.0%} of what can be read")


def main() -> None:
    """Measure and print; everything measured goes to bench/work/kernels.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 512], help="rows of x")
    parser.add_argument("--warm", action="store_true", help="one matrix again and again")
    parser.add_argument("--tables", action="store_true", help="products with tables of levels alone")
    args = parser.parse_args()
    if args.tables:
        for threads in args.threads:
            for m in args.m:
                tables(threads, *SHAPES[0], m, 0.0 if args.warm or m >= MANY else COLD_BYTES)
        return
    everything = {}
    for threads in args.threads:
        read = max(float(words[1]) for _ in range(args.rounds) for words in lines_of(read_program(), threads))
        print(f"{threads} threads: memory is read at {read / 1e9:.1f} GB/s", flush=True)
        for shape in SHAPES:
            for m in args.m:
                best = measure(threads, *shape, m, 0.0 if args.warm or m >= MANY else COLD_BYTES, args.rounds)
                print(f"{shape[0]} x {shape[1]}, m = {m}, {threads} threads" + (", warm" if args.warm else ""))
                report(best, read if m == 1 and not args.warm else None, shape)
                sys.stdout.flush()
                everything[f"{threads} {shape} {m} {'warm' if args.warm else 'cold'}"] = best
    (WORK / "kernels.json").write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
