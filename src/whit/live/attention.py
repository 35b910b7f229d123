"""Attention while a frozen model writes one token at a time.

transformers lets models name the function they attend with. Those that name torch's ("sdpa") get one here that takes
the kernel of `kernels.attention` where it serves, is faster and nothing watches, and torch's for everything else.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from whit.kernels.attention import attend
from whit.kernels.matmul import unwatched

NAME = "whit"
THEIRS = "sdpa"


class Registered:
    """Says in copies and pickles of a model that its function must be known where they come to life."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return register, ()


def register() -> Registered:
    """Make the function known to transformers, under `NAME`, with the masks of torch's attention."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[THEIRS])
    return Registered()


def attend_natively(model: nn.Module) -> None:
    """Let the parts of a model that attend with torch's function take the one here, in place.

    `model.set_attn_implementation("sdpa")` takes it back; no file that is saved says anything of it.
    """
    if "transformers" not in sys.modules:  # then it is none of theirs
        return
    from transformers import PreTrainedModel

    for each in model.modules():
        if not isinstance(each, PreTrainedModel) or each.config._attn_implementation != THEIRS:
            continue
        if type(each)._can_set_attn_implementation():
            each._whit_attention = register()
            each.config._attn_implementation_internal = NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' function for torch's attention.

    query       [rows, heads, n, width]
    key, value  [rows, key heads, n, width]
    Returns [rows, n, heads, width], and None.
    """
    if (
        query.shape[2] == 1
        and query.dtype in (torch.bfloat16, torch.float16)  # in float32 torch's own is as fast
        and not dropout
        and unwatched(query)
        and others.get("position_bias") is others.get("cache") is others.get("softcap") is None
    ):
        found = attend(query, key, value, attention_mask, scaling)
        if found is not None:
            return found, None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    theirs: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return theirs
