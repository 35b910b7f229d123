"""Where the inputs of a matrix can be rescaled at no cost: the tensors before it that absorb the inverse.

y = W x = (W diag(t)) (x / t). The division disappears into whatever makes x, if that is linear in it:

    norm weight (and bias)  ->  the matrices that read the normed hidden states
    rows of the up projection  ->  columns of the down projection, where a gate stands between them: up is linear
    rows of the value projection (and its bias)  ->  columns of the output projection; one factor serves every query
                                                    head that shares the value head

Names are those of GGUF, which are the same for all architectures, and so are its norms: a multiplication with what is
stored, also for models whose own files store the weight less one. Whether a model computes what its names say is
checked by running a block (pipeline/folding.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pair:
    """Consumers whose columns may be multiplied with t when the rows of the producers are divided by it.

    producers  tensors of [channels] or [channels, cols]
    consumers  matrices whose columns are those channels
    channel    [cols] int64, the channel of every column of the consumers
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    channel: Tensor


def block_pairs(shapes: Shapes, prefix: str, n_kv_heads: int) -> list[Pair]:
    """The pairs within one block, first those whose consumers come first.

    shapes      of all tensors in the file
    prefix      such as `blk.3.`
    n_kv_heads  key/value heads of this block
    """
    pairs = [
        _normed(shapes, prefix, "attn_norm", ("attn_q", "attn_k", "attn_v", "attn_qkv")),
        _value(shapes, prefix, n_kv_heads),
        _normed(shapes, prefix, "ffn_norm", ("ffn_gate", "ffn_up")),
        _gated(shapes, prefix),
    ]
    return [pair for pair in pairs if pair is not None]


def head_pair(shapes: Shapes) -> Pair | None:
    """The final norm and a head that is not the embedding."""
    return _normed(shapes, "", "output_norm", ("output",)) if "output.weight" in shapes else None


def _normed(shapes: Shapes, prefix: str, norm: str, readers: tuple[str, ...]) -> Pair | None:
    producers = _present(shapes, (f"{prefix}{norm}.weight", f"{prefix}{norm}.bias"))
    consumers = _present(shapes, tuple(f"{prefix}{reader}.weight" for reader in readers))
    experts = any(name.startswith(f"{prefix}ffn_") and len(shape) == 3 for name, shape in shapes.items())
    if not producers or not consumers or (norm == "ffn_norm" and experts):
        return None
    return Pair(producers, consumers, torch.arange(shapes[consumers[0]][-1]))


def _gated(shapes: Shapes, prefix: str) -> Pair | None:
    up, gate, down = (f"{prefix}ffn_{part}.weight" for part in ("up", "gate", "down"))
    if not all(name in shapes and len(shapes[name]) == 2 for name in (up, gate, down)):
        return None
    producers = _present(shapes, (up, f"{prefix}ffn_up.bias"))
    return Pair(producers, (down,), torch.arange(shapes[down][-1]))


def _value(shapes: Shapes, prefix: str, n_kv_heads: int) -> Pair | None:
    value, output = f"{prefix}attn_v.weight", f"{prefix}attn_output.weight"
    if value not in shapes or output not in shapes or n_kv_heads < 1:
        return None
    rows, cols = shapes[value][0], shapes[output][-1]
    width = rows // n_kv_heads
    if width * n_kv_heads != rows or cols % rows:
        return None
    shared = cols // rows  # query heads to a value head
    column = torch.arange(cols)
    head = column // width // shared
    return Pair(_present(shapes, (value, f"{prefix}attn_v.bias")), (output,), head * width + column % width)


def _present(shapes: Shapes, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name in shapes)
