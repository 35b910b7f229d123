"""Attention while a frozen model writes one token at a time.

transformers lets models name the function they attend with. Those that name torch's ("sdpa") get one here that takes
the kernel of `kernels.attention` where it serves, is faster and nothing watches, and torch's for everything else.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from whit.kernels.attention import attend, serves
from whit.kernels.matmul import unwatched

NAME = "whit"
THEIRS = "sdpa"
# What transformers' function for torch's attention is told besides, and this one does not know; None says nothing.
UNKNOWN = ("position_bias", "cache", "softcap")


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
        query.dtype in (torch.bfloat16, torch.float16)  # in float32 torch's own is as fast
        and query.shape[2] == 1
        and not dropout
        and (attention_mask is None or attention_mask.shape[1:3] == (1, 1))
        and all(others.get(name) is None for name in UNKNOWN)
        and unwatched(query)
        and serves(query, key, value)
    ):
        return attend(query, key, value, attention_mask, scaling), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return found
