"""A small language model whose rows fit superblocks of 256: trained here, from text that is on every machine.

`python -m bench.small_model FOLDER [--steps N]` gathers docstrings of installed packages (and the calibration half of
 Python's own documentation, never the held-out half), trains a byte-level BPE of 8192 tokens on them and then a
Llama of width 512 with 6 blocks, in bfloat16 autocast. Seeded; the text depends on the versions installed.
"""

from __future__ import annotations

import argparse
import ast
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from whit.calibration.text import documentation_text

VOCABULARY, WINDOW, BATCH = 8192, 256, 16
PACKAGES = ("transformers", "torch", "numpy", "huggingface_hub", "sympy", "rich", "typer", "networkx", "setuptools")
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def documents() -> Iterator[str]:
    """Calibration documentation of Python, then docstrings of installed packages in the order of their paths."""
    yield documentation_text("calibration").content
    root = Path(sysconfig.get_path("purelib"))
    held_out = documentation_text("held-out").content
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
            yield "\n\n".join(text for text in texts if len(text) > 200 and text[:200] not in held_out)


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", add_prefix_space=False
    )


def train(folder: Path, steps: int) -> None:
    """Train and save; the loss is printed every hundred steps."""
    torch.manual_seed(0)
    texts = [text for text in documents() if text]
    tokenizer = tokenizer_of(texts)
    ids = torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], 0]])
    print(f"{sum(map(len, texts)) / 1e6:.1f} MB of text, {len(ids) / 1e6:.2f}M tokens", flush=True)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    started = time.time()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        starts = torch.randint(0, len(ids) - WINDOW - 1, (BATCH,))
        batch = torch.stack([ids[s : s + WINDOW] for s in starts.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    train(arguments.folder, arguments.steps)
