"""llama.cpp's named mixtures: which type each tensor gets, as tables.

A mixture is a base type and exceptions. An exception names the mixtures it belongs to, the role of the tensor, a
condition on the model and the block, and the type; of all that apply the first counts. People know these mixtures by
size and behaviour, so they are followed exactly, for every tensor that rows allow; where rows do not divide into
blocks the plan takes the next type that fits (pipeline/plan.py).
Source: the behaviour of llama.cpp's quantizer, checked against it tensor by tensor (bench/mixtures.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BASE = {
    "q8_0": "q8_0",
    "q5_1": "q5_1",
    "q5_0": "q5_0",
    "q4_1": "q4_1",
    "q4_0": "q4_0",
    "q6_k": "q6_k",
    "q5_k_m": "q5_k",
    "q5_k_s": "q5_k",
    "q4_k_m": "q4_k",
    "q4_k_s": "q4_k",
    "q3_k_l": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_s": "q3_k",
    "q2_k": "q2_k",
    "q2_k_s": "q2_k",
    "iq4_nl": "iq4_nl",
    "iq4_xs": "iq4_xs",
    "iq3_m": "iq3_s",
    "iq3_s": "iq3_s",
    "iq3_xs": "iq3_s",
    "iq3_xxs": "iq3_xxs",
    "iq2_m": "iq2_s",
    "iq2_s": "iq2_xs",
    "iq2_xs": "iq2_xs",
    "iq2_xxs": "iq2_xxs",
    "tq2_0": "tq2_0",
    "tq1_0": "tq1_0",
    "mxfp4_moe": "q8_0",
}
TWO_BIT_LOW, TWO_BIT_HIGH = "iq2_xxs iq2_xs", "iq2_s iq2_m"
TWO_BIT = f"{TWO_BIT_LOW} {TWO_BIT_HIGH}"
OTHERS = " ".join(name for name in BASE if name not in TWO_BIT.split())
EIGHT_EXPERTS = 8
MANY_SHARE = 4  # query heads per key/value head from which on attn_v is small beside the rest
SEVENTY_B = 80  # blocks of the models in which eight query heads share one attn_v


@dataclass(frozen=True)
class Facts:
    """What a mixture looks at.

    n_blocks, n_experts, heads_per_kv  of the model (heads_per_kv: query heads per key/value head)
    tied                               whether the embedding is the head
    importance                         whether activations are known when weights are rounded
    """

    n_blocks: int
    n_experts: int
    heads_per_kv: int
    tied: bool
    importance: bool


Condition = Callable[[Facts, int], bool]  # the model, the block


def _always(model: Facts, block: int) -> bool:
    return True


def _many_share(model: Facts, block: int) -> bool:
    return model.heads_per_kv >= MANY_SHARE


def _eight_experts(model: Facts, block: int) -> bool:
    return model.n_experts == EIGHT_EXPERTS


def _not_eight(model: Facts, block: int) -> bool:
    return model.n_experts != EIGHT_EXPERTS


def _sensitive(model: Facts, block: int) -> bool:
    """The first and the last eighth of the blocks, and every third between."""
    n = model.n_blocks
    return block < n // 8 or block >= 7 * n // 8 or (block - n // 8) % 3 == 2


def _middle(model: Facts, block: int) -> bool:
    return model.n_blocks // 8 <= block < 7 * model.n_blocks // 8


def _experts(model: Facts, block: int) -> bool:
    return model.n_experts > 1


def _no_importance(model: Facts, block: int) -> bool:
    return not model.importance


def _first(divisor: int) -> Condition:
    return lambda model, block: block < model.n_blocks // divisor


def _below(count: int) -> Condition:
    return lambda model, block: block < count


def _first_eighth_if(importance: bool) -> Condition:
    return lambda model, block: model.importance == importance and block < model.n_blocks // 8


@dataclass(frozen=True)
class Special:
    """In these mixtures, tensors of these roles get `kind` where the condition holds."""

    mixtures: str
    roles: str
    kind: str
    when: Condition = _always


EXCEPTIONS = (
    # the value projection: small and sensitive
    Special(OTHERS, "attn_v", "q8_0", _eight_experts),
    Special(TWO_BIT, "attn_v", "q4_k", lambda model, block: _many_share(model, block) or model.n_experts >= 4),
    Special(TWO_BIT_LOW, "attn_v", "q2_k"),
    Special(TWO_BIT_HIGH, "attn_v", "iq3_s"),
    Special("iq3_xxs iq3_xs iq3_s", "attn_v", "q4_k", _many_share),
    Special("iq3_xxs", "attn_v", "iq3_s", _no_importance),
    Special("iq3_m", "attn_v", "q4_k"),
    Special("q2_k q2_k_s", "attn_v", "q4_k", _many_share),
    Special("q2_k", "attn_v", "q3_k"),
    Special("q3_k_m", "attn_v", "q5_k", _below(2)),
    Special("q3_k_m", "attn_v", "q4_k"),
    Special("q3_k_l", "attn_v", "q5_k"),
    Special("iq4_nl iq4_xs", "attn_v", "q5_k", _many_share),
    Special("q4_k_m q5_k_m", "attn_v", "q6_k", _sensitive),
    Special("q4_k_s", "attn_v", "q5_k", _below(4)),
    # queries and keys
    Special(OTHERS, "attn_k", "q8_0", _eight_experts),
    Special(TWO_BIT, "attn_k", "q4_k", _eight_experts),
    Special("iq3_xs", "attn_q attn_k", "iq3_xxs"),
    Special("iq3_xxs", "attn_q attn_k", "iq2_s"),
    # the second matrix of the feed-forward part: its inputs vary most
    Special("q2_k", "ffn_down", "q3_k"),
    Special("q2_k_s", "ffn_down", "q4_k", _first(8)),
    Special("q3_k_m", "ffn_down", "q5_k", _first(16)),
    Special("q3_k_m", "ffn_down", "q4_k"),
    Special("q3_k_l", "ffn_down", "q5_k"),
    Special("q4_k_m q5_k_m", "ffn_down", "q6_k", _sensitive),
    Special("q4_k_s", "ffn_down", "q5_k", _first(8)),
    Special("iq4_nl iq4_xs", "ffn_down", "q5_k", _first_eighth_if(importance=False)),
    Special("q4_0", "ffn_down", "q4_1", _first_eighth_if(importance=True)),
    Special("q5_0", "ffn_down", "q5_1", _first_eighth_if(importance=True)),
    Special("iq3_xxs", "ffn_down", "q4_k", _first_eighth_if(importance=False)),
    Special("iq3_xxs", "ffn_down", "q3_k", _no_importance),
    Special("iq3_m", "ffn_down", "q4_k", _first(8)),
    Special("iq3_m", "ffn_down", "q4_k", lambda model, block: model.n_experts == 8 and _sensitive(model, block)),
    Special(TWO_BIT_LOW, "ffn_down", "q2_k", _first(8)),
    Special(TWO_BIT_HIGH, "ffn_down", "iq3_s", _first(8)),
    # the first ones
    Special("iq3_xs", "ffn_up ffn_gate", "iq3_xxs", _middle),
    Special("mxfp4_moe", "ffn_up ffn_gate ffn_down", "mxfp4", _experts),
    # the output projection
    Special("q2_k q3_k_s q3_k_m q4_k_s q4_k_m iq4_nl iq4_xs", "attn_output", "q5_k", _eight_experts),
    Special("iq3_xxs iq3_xs iq3_s iq3_m", "attn_output", "q5_k", _eight_experts),
    Special(TWO_BIT, "attn_output", "q5_k", _eight_experts),
    Special(TWO_BIT_HIGH, "attn_output", "iq3_s"),
    Special("iq3_xxs", "attn_output", "iq3_s", _not_eight),
    Special("iq3_m", "attn_output", "q4_k", _not_eight),
    Special("q2_k", "attn_output", "q3_k", _not_eight),
    Special("q3_k_m", "attn_output", "q4_k", _not_eight),
    Special("q3_k_l", "attn_output", "q5_k", _not_eight),
    # the embedding, where it is not the head too
    Special(TWO_BIT_LOW, "embedding", "q2_k"),
    Special(f"{TWO_BIT_HIGH} iq3_xxs", "embedding", "iq3_s"),
    Special("tq1_0 tq2_0", "embedding", "q4_k"),
)
SMALL_BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # of 32 weights; all others have 256

ROLES = (
    (r"^output\.weight$", "head"),
    (r"^token_embd\.weight$", "embedding"),
    (r"\.attn_(v|qkv)\.weight$", "attn_v"),
    (r"\.attn_k\.weight$", "attn_k"),
    (r"\.attn_q\.weight$", "attn_q"),
    (r"\.attn_output\.weight$", "attn_output"),
    (r"\.ffn_down", "ffn_down"),
    (r"\.ffn_up(_exps)?\.", "ffn_up"),
    (r"\.ffn_gate(_exps)?\.", "ffn_gate"),
)


def mixture(name: str, tensors: Sequence[tuple[str, tuple[int, ...]]], model: Facts) -> dict[str, str]:
    """The type (in lower case) of every matrix of a model under the mixture `name`.

    tensors  GGUF name and shape (rows last but one, columns last)
    Raises KeyError for a name that is not in BASE. Types may not fit the rows: see `pipeline/plan.py`.
    """
    base = BASE[name]
    applying = [exception for exception in EXCEPTIONS if name in exception.mixtures.split()]
    low = name in TWO_BIT.split() or name == "iq3_xxs"
    return {tensor: _kind(tensor, shape[-1], base, low, applying, model) for tensor, shape in tensors}


def _kind(tensor: str, cols: int, base: str, low: bool, applying: Sequence[Special], model: Facts) -> str:
    role = next((role for pattern, role in ROLES if re.search(pattern, tensor)), "")
    if role == "head" or (role == "embedding" and model.tied):
        block = 32 if base in SMALL_BLOCKS else 256
        return "q8_0" if base == "q8_0" or cols % block else "q5_k" if low else "q6_k"
    found = re.match(r"blk\.(\d+)\.", tensor)
    index = int(found[1]) if found else 0
    kind = next((each.kind for each in applying if role in each.roles.split() and each.when(model, index)), base)
    if role == "attn_v" and model.n_blocks == SEVENTY_B and model.heads_per_kv > 1 and kind in ("q3_k", "q4_k"):
        return "q5_k"
    return kind
