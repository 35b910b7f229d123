"""A tiny Llama that has learned a little English: random ones give every verdict the same weight."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import torch

from tiny import tiny_model
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer

WINDOW = 64


def save_trained(folder: Path, seed: int = 0, steps: int = 150) -> torch.Tensor:
    """Train and save a model with its tokenizer; returns windows [n, 64] int64 that it has not seen. Takes seconds."""
    model = tiny_model("llama", seed, vocab_size=TOY_VOCAB)
    folder.mkdir(parents=True)
    save_toy_tokenizer("llama", folder)
    model.save_pretrained(folder)
    text = "\n".join(topics[name] for name in sorted(topics)[:30])
    ids = torch.tensor(load_tokenizer(open_model(folder)).encode(text))
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    held, seen = windows[::8], windows[torch.arange(len(windows)) % 8 != 0]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = seen[torch.randint(len(seen), (8,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return held
