"""What the tables of several architectures have in common."""

from __future__ import annotations

from whit.models.known_table import Key, Weight
from whit.models.known_traits import Required

PLAIN_SCALINGS = ("linear", "yarn")
MASKS = (r"\.rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")
ONE_GRAPH = "llama.cpp's graph for this architecture has only one activation"


HEAD = Weight("output.weight", ("lm_head.weight",), ("vocab", "hidden"))


def sizes(
    vocab: int,
    hidden: int,
    ff: int,
    layers: int,
    heads: int,
    context: int,
    ff_name: str = "intermediate_size",
    ff_key: str = "feed_forward_length",
) -> tuple[Key, ...]:
    """The six sizes of every model, given transformers' class defaults."""
    return (
        Key("vocab_size", vocab, "vocab_size", "vocab"),
        Key("max_position_embeddings", context, "context_length", "context"),
        Key("hidden_size", hidden, "embedding_length", "hidden"),
        Key("num_hidden_layers", layers, "block_count", "layers"),
        Key(ff_name, ff, ff_key, "ff"),
        Key("num_attention_heads", heads, "attention.head_count", "heads"),
    )


def must(entry: str, value: object, why: str) -> Required:
    """An entry with one possible value; None counts as False."""
    return Required(entry, value, (value, None) if value in (False, None) else (value,), value, why)


def activation(entry: str, *allowed: str) -> Required:
    """The activation: the class default, then others that the graph computes as well."""
    return Required(entry, allowed[0], allowed, allowed[0], ONE_GRAPH)
