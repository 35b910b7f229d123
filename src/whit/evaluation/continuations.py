"""What a model would write next, greedily: the difference that a person sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Continuations:
    """Two models' continuations of the same prompts.

    prompts    how many
    tokens     written for each
    same       share of all tokens before the first difference
    identical  prompts that were continued alike to the end
    """

    prompts: int
    tokens: int
    same: float
    identical: int


def greedy(module: nn.Module, prompts: Tensor, n_tokens: int) -> Tensor:
    """The most likely next tokens, one by one.

    module   as `load_module` makes it
    prompts  [prompts, length] int64
    Returns [prompts, n_tokens] int64. No end of text ends it: what comes after is the same for both when they agree.
    """
    ids, cache, out = prompts.to(next(module.parameters()).device), None, []
    with torch.inference_mode():
        for _ in range(n_tokens):
            result = module(input_ids=ids, past_key_values=cache, use_cache=True)
            ids, cache = result.logits[:, -1].argmax(-1, keepdim=True), result.past_key_values
            out.append(ids)
    return torch.cat(out, dim=1).cpu()


def compared(candidate: Tensor, reference: Tensor) -> Continuations:
    """Two results of `greedy` [prompts, tokens] int64 on the same prompts."""
    n, length = reference.shape
    agreed = (candidate == reference).long().cumprod(1).sum(1)  # tokens before the first difference
    return Continuations(n, length, agreed.sum().item() / (n * length), int((agreed == length).sum()))
