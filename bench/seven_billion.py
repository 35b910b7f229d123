"""A checkpoint as large as Llama 7B: `python -m bench.seven_billion [--layers 32]`.

Random weights in bfloat16, in shards of 2 GB, made in bench/work. First plain rounding, all matrices to Q4_0 and to
Q4_K, against llama.cpp's quantizer on the same model as a GGUF file; then `fast` on its first blocks, and what that
means for all of them. Wall time, processor seconds and peak resident memory are of whole commands.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from bench.measure import Run, run
from bench.peers import WORK, llama_cpp
from bench.small_model import VOCABULARY, tokenizer_of
from whit.calibration.text import documentation_text

THREADS = "2"
FEW = 4  # blocks for the calibrated run
WIDTH, INNER = 4096, 11008


def main() -> None:
    """Two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recipes", nargs="*", default=["q4_0", "q4_k_m"])
    arguments = parser.parse_args()
    folder = shaped(arguments.layers)
    size = sum(each.stat().st_size for each in folder.glob("*.safetensors"))
    source, out = WORK / f"{folder.name}.gguf", WORK / "out.gguf"
    print(f"{arguments.layers} blocks of width {WIDTH}, {size / 1e9:.1f} GB.\n")
    print("| job | seconds | CPU seconds | peak MB |\n|---|---|---|---|", flush=True)
    _row("folder to a bfloat16 GGUF file, Whit", _whit(folder, "bf16", source))
    for recipe in arguments.recipes:
        peer = run(llama_cpp("llama-quantize"), "--pure", source, out, recipe.upper(), THREADS)
        out.unlink()
        _row(f"GGUF to {recipe}, llama.cpp", peer)
        for name, given in (("GGUF", source), ("folder", folder)):
            ours = _whit(given, recipe, out, "--pure", "--rounding", "nearest")
            out.unlink()
            _row(f"{name} to {recipe}, Whit ({ours.seconds / peer.seconds:.2f} of llama.cpp)", ours)
    source.unlink()
    few, fewer = (_whit(shaped(n), "q4_k_m", out, "--preset", "fast", "--calib", "docs") for n in (FEW, FEW // 2))
    _row(f"{FEW} blocks, q4_k_m, `fast`", few)
    _row(f"{FEW // 2} blocks, q4_k_m, `fast`", fewer)
    block = (few.seconds - fewer.seconds) / (FEW - FEW // 2)
    print(f"\n{block:.0f} s per block. Extrapolated to 32 blocks: {(few.seconds + (32 - FEW) * block) / 60:.0f} min.")


def _whit(source: Path, recipe: str, out: Path, *more: str) -> Run:
    whit = Path(sys.executable).with_name("whit")
    return run(whit, "quantize", "--no-verify", source, "--recipe", recipe, "-o", out, "--force", *more)


def _row(job: str, found: Run) -> None:
    print(f"| {job} | {found.seconds:.0f} | {found.cpu_seconds:.0f} | {found.peak_bytes / 1e6:.0f} |", flush=True)


def shaped(layers: int) -> Path:
    """A folder of random weights, one shard per four blocks."""
    folder = WORK / f"llama-7b-{layers}"
    if (folder / "model.safetensors.index.json").exists():
        return folder
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    tokenizer_of([documentation_text("calibration").content]).save_pretrained(folder)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    home: dict[str, str] = {}
    outer = {"model.embed_tokens": (VOCABULARY, WIDTH), "model.norm": (WIDTH,), "lm_head": (VOCABULARY, WIDTH)}
    parts = [outer] + [_blocks(range(at, min(at + 4, layers))) for at in range(0, layers, 4)]
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        tensors = {
            f"{key}.weight": torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape).mul_(0.02).bfloat16()
            for key, shape in part.items()
        }
        save_file(tensors, folder / name, {"format": "pt"})
        home |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


def _blocks(numbers: range) -> dict[str, tuple[int, ...]]:
    square = dict.fromkeys((f"self_attn.{one}_proj" for one in "qkvo"), (WIDTH, WIDTH))
    wide = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, WIDTH))
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (WIDTH,))
    block: dict[str, tuple[int, ...]] = {**square, **wide, "mlp.down_proj": (WIDTH, INNER), **norms}
    return {f"model.layers.{n}.{key}": shape for n in numbers for key, shape in block.items()}


if __name__ == "__main__":
    main()
