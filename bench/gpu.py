"""Equal bits, equal groups, equal tokens: Whit's GPTQ files beside those of GPTQModel, llm-compressor and AutoRound.

`python -m bench.gpu [--bits 4] [--group 64] [--samples 128] [--tools ...] [--iters 200]`. Every tool gets the same
calibration windows as token ids and writes symmetric groups; embedding and head stay in float. All files are read by
Whit and measured by one evaluator on text that nobody saw; each tool's own reader says what it makes of its own file.
Tools live in environments of their own in bench/work, made on first use; each runs with one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import venv
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.measure import run
from bench.models import inputs
from bench.peers import WORK
from whit.evaluation.compare import compare_states, final_states
from whit.models.open import open_model

SCRIPTS = Path(__file__).parent / "peer_scripts"
TORCH = "torch==2.13.0"
# tool -> environment, packages, script
TOOLS = {
    "llm-compressor": ("gpu-peers", ("llmcompressor==0.14.0.1",), "llmcompressor_gptq.py"),
    "gptqmodel": ("gptq-peer", ("setuptools", "wheel", "gptqmodel==7.6.0"), "gptqmodel_gptq.py"),
    "autoround": ("ar-peer", ("auto-round==0.16.1",), "autoround.py"),
}
FASTER = ("llm-compressor-in-bfloat16", "gptqmodel-in-bfloat16")  # on processors with units for it
# Presets on all windows; `fast` reads 8 when nothing is said. TRAINED is trained further on the same windows.
WHIT = ("fast-8", "fast", "balanced")
TRAINED = "balanced, trained"
REPORTED, OWN = 24, 4  # windows; some are also read by each tool itself


def python_of(tool: str) -> Path:
    """The interpreter of a tool's environment, which is made when it is not there."""
    home, packages, _ = TOOLS[tool]
    python = WORK / home / "bin" / "python"
    if not python.exists():
        venv.create(WORK / home, with_pip=True)
        pip = (python, "-m", "pip", "install", "-q")
        subprocess.run([*map(str, pip), TORCH], check=True)
        for package in packages:
            more = ["--no-build-isolation"] if package.startswith("gptqmodel") else []
            environment = {**os.environ, "BUILD_CUDA_EXT": "0"}
            subprocess.run([*map(str, pip), *more, package, TORCH], check=True, env=environment)
    return python


def main() -> None:
    """One row per tool."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--iters", type=int, default=200, help="of AutoRound")
    parser.add_argument("--tools", nargs="*", default=[*TOOLS, *FASTER, *WHIT, TRAINED])
    arguments = parser.parse_args()
    given = inputs(arguments.model, arguments.samples, REPORTED)
    model, name, ids = open_model(arguments.model), given.name, given.ids
    reference, reference_of_few = final_states(model, ids), final_states(model, ids[:OWN])
    print(
        f"{name}, {arguments.bits} bits in groups of {arguments.group}, symmetric, "
        f"{arguments.samples} windows of 512 tokens\n"
    )
    save_file({"tokens": ids.contiguous()}, WORK / f"{name}.reported.safetensors")
    print("| tool | KL | same top | perplexity (original) | CPU seconds | wall | peak MB | MB of layers | own reader |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for tool in arguments.tools:
        out = _out(name, tool, arguments)
        cost = _cost(tool, given.folder, given.tokens, out, arguments)
        found = compare_states(final_states(open_model(out), ids), reference, ids)
        few = compare_states(final_states(open_model(out), ids[:OWN]), reference_of_few, ids[:OWN])
        tensors = open_model(out).tensors
        layers = sum(tensors.info(each).n_bytes for each in tensors.names() if "_proj" in each)
        print(
            f"| {tool} | {found.kl_mean:.5f} ± {found.kl_mean_se:.5f} | {found.same_top:.3f} | {found.perplexity:.3f} "
            f"({found.perplexity_reference:.3f}) | {cost['cpu_seconds']:.0f} | {cost['wall_seconds']:.0f} | "
            f"{cost['peak_mb']:.0f} | {layers / 1e6:.2f} | {_own(tool, name, out)}{few.perplexity:.4f} |",
            flush=True,
        )


def _out(name: str, tool: str, arguments: argparse.Namespace) -> Path:
    return WORK / f"gpu-{name}-{arguments.bits}-{arguments.group}-{tool.replace(', ', '-')}"


def _own(tool: str, name: str, out: Path) -> str:
    """The perplexity of OWN windows in the tool's own reader; Whit's follows in the table."""
    tool = tool.partition("-in-")[0]
    if tool not in TOOLS:
        return ""
    tokens = WORK / f"{name}.reported.safetensors"
    reader = "gptqmodel" if tool == "autoround" else tool  # it writes that format and brings no reader of its own
    command = [python_of(reader), SCRIPTS / "evaluate.py", out, tokens, "--windows", str(OWN)]
    lines = [line for line in run(*command).output.splitlines() if line.startswith('{"nll"')]
    return f"{math.exp(json.loads(lines[-1])['nll']):.4f} / "


def _cost(tool: str, folder: Path, tokens: Path, out: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run a tool and say what it took; a run that is still there is not made again."""
    kept = out.with_suffix(".json")
    if kept.exists() and out.exists():
        found: dict[str, float] = json.loads(kept.read_text())
        return found
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    tool, _, dtype = tool.partition("-in-")
    if tool == TRAINED:
        start = _out(folder.name.removesuffix("-f32"), "balanced", arguments)
        made = _cost("balanced", folder, tokens, start, arguments)
        done = run(sys.executable, "-m", "bench.tuned", str(start), str(folder), str(tokens), str(out), env=environment)
        found = {"cpu_seconds": made["cpu_seconds"] + done.cpu_seconds}
        found |= {"wall_seconds": made["wall_seconds"] + done.seconds}
    elif tool in WHIT:
        command = [sys.executable, "-c", "import sys; from whit.cli.app import run; sys.exit(run(sys.argv[1:]))"]
        command += [
            "quantize",
            "--no-verify",
            str(folder),
            "--recipe",
            f"gptq-{arguments.bits}bit-g{arguments.group}",
            "-o",
            str(out),
        ]
        preset, _, few = tool.partition("-")
        command += ["--preset", preset, "--calib", "docs", "--windows", few or str(arguments.samples), "--force"]
        done = run(*command, env=environment)
        found = {"cpu_seconds": done.cpu_seconds, "wall_seconds": done.seconds}
    else:
        command = [str(python_of(tool)), str(SCRIPTS / TOOLS[tool][2]), str(folder), str(tokens), str(out)]
        command += ["--bits", str(arguments.bits), "--group", str(arguments.group)]
        command += ["--iters", str(arguments.iters)] if tool == "autoround" else []
        command += ["--bfloat16"] if dtype else []
        done = run(*command, env=environment)
        lines = [line for line in done.output.splitlines() if line.startswith('{"tool"')]
        found = json.loads(lines[-1])
    found["peak_mb"] = done.peak_bytes / 2**20
    kept.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
