"""Live models beside optimum-quanto: `python -m bench.live [--windows 24]`.

Coverage and bytes of GPT-2 (transformers' default configuration, random weights) at 8 bits; divergence of SmolLM2-135M
with 8-bit weights and activations, and with 4-bit weights. Both sides read the same 8 windows of documentation where
they calibrate, and are measured on the same text. quanto lives in an environment of its own, made on first use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
import venv

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config

from bench.gpu import SCRIPTS, TORCH
from bench.measure import run
from bench.peers import WORK
from whit import calibrate, freeze, quantize
from whit.calibration.text import default_text, documentation_text, windows
from whit.grids.named import grid_name
from whit.live.quantize import n_bytes
from whit.live.run import calls_of, log_probabilities
from whit.live.types import qint8, type_named
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.convert import convert

READ = 8
METHODS = {
    "minmax": ("minmax", False),
    "mse": ("mse", False),
    "mse, smoothed": ("mse", True),
    "auto": ("auto", False),
    "auto, smoothed": ("auto", True),
    "a scale per token": ("", False),
}
WEIGHTS = ("qint4", "int4-g32-asym", "int4-g64", "nf4-g64", "kmeans4")
QUANTO = ("optimum-quanto==0.2.7", "transformers==5.23.0", "accelerate")


def main() -> None:
    """Three tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="of calibration")
    parser.add_argument("--weights", nargs="*", default=list(WEIGHTS), help="types of 4 bits")
    arguments = parser.parse_args()
    n = arguments.windows
    model = open_model("smollm2-135m")
    tokenizer = load_tokenizer(model)
    folder, tokens, docs = WORK / "smollm2-135m-f32", WORK / "live.tokens.safetensors", WORK / "live.docs.safetensors"
    if not folder.exists():
        convert(model, "f32", folder, requantize=False)
    read = windows(tokenizer.encode(documentation_text("calibration").content), limit=READ)
    ids = windows(tokenizer.encode(default_text().content), limit=n)
    save_file({"tokens": ids.contiguous()}, tokens)
    save_file({"tokens": read.contiguous()}, docs)

    print("GPT-2, 124M, random weights, 8 bits:\n")
    print("| | parameters of linear and embedding layers quantized | bytes of float32 | largest change of a logit |")
    print("|---|---|---|---|", flush=True)
    theirs = _quanto("gpt2", str(tokens), "--head", "--windows", "1")
    print(f"| optimum-quanto | {theirs['share']:.1%} | {theirs['bytes_after'] / theirs['bytes_before']:.3f} | |")
    torch.manual_seed(0)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config()).eval()
    ours = ids[:1] % GPT2Config().vocab_size
    with torch.no_grad():
        expected = gpt2(ours).logits
        before = n_bytes(gpt2)
        report = quantize(gpt2, weights=qint8)
        freeze(gpt2)
        change = (gpt2(ours).logits - expected).abs().max().item() / expected.abs().max().item()
    matrices = sum(each.n_parameters for each in report.replaced if each.weights and each.name != "lm_head")
    floats = sum(each.n_parameters for each in report.left if "norm" not in each.reason)
    print(
        f"| Whit | {matrices / (matrices + floats):.1%} | {n_bytes(gpt2) / before:.3f} | {change:.4f} |\n", flush=True
    )
    del gpt2

    print(f"SmolLM2-135M, {n} windows of held-out text, {READ} windows read where something is calibrated:\n")
    print("| | weights | activations | KL | ratio to quanto | MB of all tensors | CPU seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    calls = calls_of(ids)
    reference = [each[ids.shape[1] // 2 : -1] for each in log_probabilities(load_module(model), calls)]

    def row(who: str, weights: str, kl: float, theirs: float, size: float, cpu: float, inputs: str = "float") -> None:
        ratio = "" if who == "optimum-quanto" else f"{kl / theirs:.3f}"
        print(f"| {who} | {weights} | {inputs} | {kl:.4f} | {ratio} | {size / 1e6:.1f} | {cpu:.0f} |", flush=True)

    found = _quanto(str(folder), str(tokens), "--activations", "qint8", "--calibration", str(docs), "--windows", str(n))
    row("optimum-quanto", "qint8", found["kl"], 1, found["bytes_after"], found["seconds"], "qint8, calibrated")
    static = found["kl"]
    for label in arguments.methods:
        method, smooth = METHODS[label]
        module, started = load_module(model), time.process_time()
        quantize(module, weights=qint8, activations=qint8, exclude=["lm_head", "*embed_tokens"])
        if method:
            with calibrate(module, method, smooth), torch.no_grad():
                for window in read:
                    module(window[None])
        freeze(module)
        seconds = time.process_time() - started
        row(f"Whit, {label}", "qint8", _scored(module, calls, reference), static, n_bytes(module), seconds, "qint8")
    found = _quanto(str(folder), str(tokens), "--weights", "qint4", "--windows", str(n))
    row("optimum-quanto", "qint4, groups of 128 (96)", found["kl"], 1, found["bytes_after"], found["seconds"])
    for weights in map(type_named, arguments.weights):
        for how in ("nearest", "feedback"):
            module, started = load_module(model), time.process_time()
            quantize(module, weights, exclude=["lm_head", "*embed_tokens"], method=how, calibration=read)
            freeze(module)
            seconds = time.process_time() - started
            name = f"{grid_name(weights)}"
            row(f"Whit, {how}", name, _scored(module, calls, reference), found["kl"], n_bytes(module), seconds)


def _scored(module: torch.nn.Module, calls: list, reference: list[torch.Tensor]) -> float:
    """Mean KL over the second halves of the windows, as everywhere."""
    total = 0.0
    for call, wanted in zip(calls, reference, strict=True):
        found = log_probabilities(module, [call])[0][-len(wanted) - 1 : -1]
        total += (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    return total / len(calls)


def _quanto(*arguments: str) -> dict[str, float]:
    python = WORK / "quanto-peer" / "bin" / "python"
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", TORCH], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *QUANTO, TORCH], check=True)
    done = run(python, SCRIPTS / "quanto.py", *arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, float] = json.loads(next(line for line in done.output.splitlines() if line.startswith('{"kl"')))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
