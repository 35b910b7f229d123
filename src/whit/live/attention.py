"""Attention while a frozen model writes one token at a time.

transformers' models look up the function that they attend with by a name, and also decide by that name what they hand
over (masks, sparse indices), so the name must stay "sdpa". What is registered under it is therefore wrapped: layers of
frozen models take the kernel of `kernels.attention` where it serves, is faster and nothing watches; for everything
else, and for all other models, transformers' own function is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from whit.kernels.attention import attend
from whit.kernels.matmul import unwatched
from whit.live.twin import Twin

THEIRS = "sdpa"
MARK = "_whit_attends"
Attention = Callable[..., tuple[Tensor, None]]


def attend_natively(model: nn.Module) -> None:
    """Let the layers of a frozen model that attend with torch's function take the kernel, in place."""
    if "transformers" not in sys.modules:  # then it is none of theirs
        return
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    theirs = ALL_ATTENTION_FUNCTIONS[THEIRS]
    if not hasattr(theirs, MARK):
        AttentionInterface.register(THEIRS, wrapped(theirs))
    for module in model.modules():
        if any(isinstance(child, Twin) for child in module.children()):
            setattr(module, MARK, True)


def wrapped(theirs: Attention) -> Attention:
    """transformers' function for torch's attention, with the kernel for one token of marked layers.

    theirs  module, query [rows, heads, n, width], key and value [rows, key heads, n, width], mask, and what else it is
            told; returns [rows, n, heads, width], and None
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
    ) -> tuple[Tensor, None]:
        if (
            getattr(module, MARK, False)
            and query.shape[2] == 1
            and query.dtype in (torch.bfloat16, torch.float16)  # in float32 torch's own is as fast
            and not others.get("dropout")
            and others.get("position_bias") is others.get("cache") is others.get("softcap") is None
            and unwatched(query)
            and not torch._C._is_any_autocast_enabled()
        ):
            found = attend(query, key, value, attention_mask, others.get("scaling"))
            if found is not None:
                return found, None
        return theirs(module, query, key, value, attention_mask, **others)

    setattr(attention, MARK, True)
    return attention
