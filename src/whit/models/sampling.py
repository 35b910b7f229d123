"""Calibration text that the model writes itself: nothing is needed but the model, in whatever language it speaks.

Source: arXiv 2305.17888 (LLM-QAT) trains on text sampled like this; here it only says what arrives at the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from whit.allocator import return_memory
from whit.models.model import Model
from whit.models.skeleton import load_module, quiet

BATCH = 24  # windows sampled side by side


def sampled_windows(
    model: Model, n_windows: int, length: int, seed: int = 0, progress: Callable[[int, int, str], None] | None = None
) -> Tensor:
    """Windows [n, length] int64 sampled at temperature 1, each from a random first token.

    The whole model is in memory, in bfloat16. Documents that end within a window are followed by what the model
    writes next. The same seed gives the same text on the same machine.
    """
    tell = progress or (lambda done, total, what: None)
    module = cast(Any, load_module(model, torch.bfloat16))
    vocabulary = module.get_input_embeddings().weight.shape[0]
    parts = []
    with torch.random.fork_rng(), torch.inference_mode(), quiet():
        torch.manual_seed(seed)
        for done in range(0, n_windows, BATCH):
            tell(done, n_windows, "text from the model")
            first = torch.randint(vocabulary, (min(BATCH, n_windows - done), 1))
            options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            # A cache of one size for the whole window: one that grows leaves a kernel and a hole in memory per length.
            options |= {"cache_implementation": "static", "disable_compile": True}
            parts.append(
                module.generate(
                    first,
                    attention_mask=torch.ones_like(first),
                    min_new_tokens=length - 1,
                    max_new_tokens=length - 1,
                    eos_token_id=None,
                    pad_token_id=0,
                    **options,
                )
            )
    tell(n_windows, n_windows, "text from the model")
    del module
    return_memory()
    return torch.cat(parts)
