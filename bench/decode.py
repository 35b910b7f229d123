"""Tokens per second, one at a time: `python -m bench.decode [1b smollm2-135m] [--threads 2] [--tokens 48]`.

transformers in bfloat16, the same model frozen by Whit to 4 and 8 bits, and llama.cpp's own llama-bench on a Q4_0 file
of the same shape, every matrix in 4 bits on both sides. `1b` has random weights: 1.2 billion, width 2048, 18 blocks.
Every run is a process of its own; rounds take turns; medians, and the resident memory of the processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from bench.measure import run
from bench.peers import WORK, llama_cpp
from whit import freeze, quantize
from whit.kernels.matmul import native
from whit.live.quantize import n_bytes
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.models.tokenizer import save_tokenizer

PROMPT = 16
SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 18,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 49152,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }
}
KINDS = {
    "transformers, bfloat16": (None, None),
    "Whit, int4-g32, bfloat16 activations": ("q4_0", None),
    "Whit, int4-g32, 8-bit activations": ("q4_0", "qint8"),
    "Whit, qint8, bfloat16 activations": ("qint8", None),
}
LLAMA = "llama.cpp, Q4_0"


def main() -> None:
    """One table per model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=["1b", "smollm2-135m"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help="measure one kind in this process and print it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(_measured(arguments.models[0], arguments.one, arguments.tokens)))
        return
    for model in arguments.models:
        _table(model, arguments)


def _table(model: str, arguments: argparse.Namespace) -> None:
    speeds: dict[str, list[float]] = {kind: [] for kind in (*KINDS, LLAMA)}
    peaks: dict[str, float] = {}
    sizes: dict[str, float] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    file = _gguf(model)
    for _ in range(arguments.rounds):
        for kind in KINDS:
            command = [sys.executable, "-m", "bench.decode", model, "--one", kind, "--tokens", str(arguments.tokens)]
            done = run(*command, "--threads", str(arguments.threads), env=environment)
            found = json.loads(done.output.splitlines()[-1])
            speeds[kind].append(found["speed"])
            peaks[kind], sizes[kind] = found["resident"], found["bytes"]
        bench = (llama_cpp("llama-bench"), "-m", file, "-p", "0", "-n", str(arguments.tokens), "-r", "1", "-o", "json")
        done = run(*bench, "-t", str(arguments.threads), env=environment)
        content = done.output[done.output.index("[\n") : done.output.rindex("]") + 1]
        speeds[LLAMA].append(json.loads(content)[0]["avg_ts"])
        peaks[LLAMA], sizes[LLAMA] = done.peak_bytes, file.stat().st_size
    base = statistics.median(speeds["transformers, bfloat16"])
    theirs = statistics.median(speeds[LLAMA])
    print(f"\n{model}, {arguments.threads} threads, {arguments.tokens} tokens, kernels: {native()}\n")
    print("| | tokens per second | of transformers | of llama.cpp | MB of weights | resident MB |")
    print("|---|---|---|---|---|---|")
    for kind, found in speeds.items():
        speed = statistics.median(found)
        ratios = f"{speed / base:.2f} | {speed / theirs:.2f}"
        print(f"| {kind} | {speed:.1f} | {ratios} | {sizes[kind] / 1e6:.0f} | {peaks[kind] / 1e6:.0f} |", flush=True)


def _measured(model: str, kind: str, tokens: int) -> dict[str, float]:
    import psutil

    module = _module(model)
    weights, activations = KINDS[kind]
    if weights:
        quantize(module, weights, activations)
        freeze(module)
    ids = torch.arange(PROMPT)[None] + 100
    with torch.inference_mode():
        found = module(input_ids=ids, use_cache=True)
        cache, last = found.past_key_values, found.logits[:, -1:].argmax(-1)
        times = []
        for _ in range(tokens):
            started = time.perf_counter()
            found = module(input_ids=last, past_key_values=cache, use_cache=True)
            last = found.logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - started)
    resident = psutil.Process().memory_info().rss
    return {"speed": 1 / statistics.median(times), "bytes": n_bytes(module), "resident": resident}


def _module(model: str) -> nn.Module:
    if model not in SHAPES:
        module = load_module(open_model(model), torch.bfloat16)
        module.set_attn_implementation("sdpa")  # what transformers takes when it loads a model
        return module
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        module = LlamaForCausalLM(LlamaConfig(**SHAPES[model], dtype=torch.bfloat16)).to(torch.bfloat16)
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    module.model.rotary_emb.__init__(module.config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.uniform_(-0.035, 0.035, generator=generator)
            else:
                parameter.fill_(1)
    module.tie_weights()
    return module


def _gguf(model: str) -> Path:
    """The same model as a Q4_0 file, embedding included."""
    path = WORK / f"decode-{model}.q4_0.gguf"
    if not path.exists():
        from whit.pipeline.quantize import write_gguf
        from whit.recipes.named import recipe_named

        source = open_model(model) if model not in SHAPES else open_model(_folder(model))
        write_gguf(source, recipe_named("q4_0", "nearest", pure=True), path)
    return path


def _folder(model: str) -> Path:
    folder = WORK / f"decode-{model}"
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(open_model("smollm2-135m"), folder)
        _module(model).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
