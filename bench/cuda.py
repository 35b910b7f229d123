"""What only a GPU can show: `python -m bench.cuda [presets] [block] [decode] [--device cuda]`.

presets  SmolLM2-135M by every preset, computed on the GPU and on the processor: the same losses within 2 %?
block    one and two blocks of OPT-175B's shape (width 12288, random weights in bfloat16, 128 x 2048 tokens of text):
         the difference is the time of a block, 96 times that a forecast for the whole model
decode   a frozen model of 1.2 billion random weights beside itself in bfloat16, one token at a time

With `--device cpu` and a small `--width` everything runs without a GPU, which shows that the script works, and no more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from bench.decode import PROMPT, _module
from bench.measure import Run, run
from bench.models import MODEL
from bench.peers import WORK
from bench.small_model import VOCABULARY, tokenizer_of
from whit import freeze, quantize
from whit.calibration.text import documentation_text

WHIT = (sys.executable, "-c", "import sys; from whit.cli.app import run; sys.exit(run(sys.argv[1:]))")
PRESETS = ("fast", "balanced", "best")
BLOCKS, PUBLISHED_HOURS = 96, 4.2  # OPT-175B; arXiv 2210.17323, on one A100
TOKENS = 128 * 2048


def main() -> None:
    """One table for each part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["presets", "block", "decode"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=12288)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--model", default="1b", help="for decode: 1b or smollm2-135m")
    asked = parser.parse_args()
    if asked.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU here. Try --device cpu --width 256 --tokens 4096.")
    WORK.mkdir(parents=True, exist_ok=True)
    if "presets" in asked.parts:
        _presets(asked.presets, asked.device)
    if "block" in asked.parts:
        _block(asked.width, asked.tokens, asked.device)
    if "decode" in asked.parts:
        _decode(asked.model, asked.device)


def _presets(names: list[str], device: str) -> None:
    print("| preset | device | seconds | KL | of the processor's |\n|---|---|---|---|---|")
    for name in names:
        kl: dict[str, float] = {}
        for place in dict.fromkeys(("cpu", device)):
            out = WORK / "cuda.gguf"
            made = _quantized(MODEL, out, "q4_k_m", place, "--preset", name)
            said = run(*WHIT, "eval", out, "--against", MODEL, "--windows", "12", "--json").output
            kl[place] = json.loads(said[said.index("{") :])["kl_mean"]
            print(
                f"| {name} | {place} | {made.seconds:.0f} | {kl[place]:.5f} | {kl[place] / kl['cpu']:.3f} |", flush=True
            )


def _block(width: int, tokens: int, device: str) -> None:
    """Of OPT's shape: feed-forward layers four times as wide, heads of 128."""
    print("\n| blocks | seconds | CPU seconds | peak MB |\n|---|---|---|---|")
    runs: list[Run] = []
    for n in (1, 2):
        out = WORK / "cuda-block"
        made = _quantized(
            str(_opt(width, n)), out, "gptq-4bit-g128", device, "--preset", "fast", "--windows", str(tokens // 512)
        )
        print(f"| {n} | {made.seconds:.0f} | {made.cpu_seconds:.0f} | {made.peak_bytes / 1e6:.0f} |", flush=True)
        runs.append(made)
    hours = (runs[1].seconds - runs[0].seconds) * BLOCKS / 3600
    print(f"\n{BLOCKS} blocks of width {width}, extrapolated: {hours:.2f} hours (GPTQ, published: {PUBLISHED_HOURS}).")


def _quantized(model: str, out: Path, recipe: str, device: str, *more: str) -> Run:
    return run(
        *WHIT, "quantize", model, "--recipe", recipe, "-o", out, "--force", "--no-verify", "--device", device, *more
    )


def _opt(width: int, blocks: int) -> Path:
    folder = WORK / f"opt-{width}-{blocks}"
    if not (folder / "config.json").exists():
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            ffn_dim=4 * width,
            num_hidden_layers=blocks,
            num_attention_heads=max(1, width // 128),
            word_embed_proj_dim=width,
            max_position_embeddings=2048,
        )
        torch.manual_seed(0)
        tokenizer_of([documentation_text("calibration").content]).save_pretrained(folder)
        OPTForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _decode(model: str, device: str) -> None:
    print(f"\n| {model} | tokens per second | of bfloat16 |\n|---|---|---|")
    speeds: dict[str, float] = {}
    for name, weights in (("bfloat16", None), ("int4-g32", "q4_0"), ("qint8", "qint8")):
        module = _module(model)
        if weights:
            quantize(module, weights)
            freeze(module)
        speeds[name] = _speed(module.to(device))
        print(f"| {name} | {speeds[name]:.1f} | {speeds[name] / speeds['bfloat16']:.2f} |", flush=True)


@torch.inference_mode()
def _speed(module: torch.nn.Module, tokens: int = 48) -> float:
    place = next(module.buffers()).device
    found = module(input_ids=torch.arange(PROMPT, device=place)[None] + 100, use_cache=True)
    cache, last, times = found.past_key_values, found.logits[:, -1:].argmax(-1), []
    for _ in range(tokens):
        started = time.perf_counter()
        last = module(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        last.cpu()  # waits for the device
        times.append(time.perf_counter() - started)
    return 1 / statistics.median(times)


if __name__ == "__main__":
    main()
