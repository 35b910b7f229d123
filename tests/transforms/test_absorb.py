"""Which tensors absorb what, and the channel of every column."""

from __future__ import annotations

import torch

from whit.transforms.absorb import block_pairs, head_pair

LLAMA = {
    "blk.0.attn_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_k.weight": (32, 64),
    "blk.0.attn_v.weight": (32, 64),
    "blk.0.attn_v.bias": (32,),
    "blk.0.attn_output.weight": (64, 64),
    "blk.0.ffn_norm.weight": (64,),
    "blk.0.ffn_gate.weight": (128, 64),
    "blk.0.ffn_up.weight": (128, 64),
    "blk.0.ffn_down.weight": (64, 128),
}


def test_the_four_pairs_of_a_llama_block() -> None:
    pairs = {pair.producers[0].split(".")[2]: pair for pair in block_pairs(LLAMA, "blk.0.", 2)}
    assert set(pairs) == {"attn_norm", "attn_v", "ffn_norm", "ffn_up"}
    assert [name.split(".")[2] for name in pairs["attn_norm"].consumers] == ["attn_q", "attn_k", "attn_v"]
    assert pairs["attn_v"].producers == ("blk.0.attn_v.weight", "blk.0.attn_v.bias")
    assert pairs["ffn_up"].consumers == ("blk.0.ffn_down.weight",)


def test_query_heads_that_share_a_value_head_share_its_channels() -> None:
    pair = next(pair for pair in block_pairs(LLAMA, "blk.0.", 2) if pair.consumers[0].endswith("attn_output.weight"))
    values = torch.randn(32)  # two heads of 16; four query heads, two to each
    repeated = values.view(2, 16).repeat_interleave(2, dim=0).reshape(-1)
    assert torch.equal(values[pair.channel], repeated)


def test_experts_keep_the_norm_before_them_and_no_gate_means_no_pair() -> None:
    experts = {name: shape for name, shape in LLAMA.items() if "ffn" not in name}
    experts |= {
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.ffn_up.weight": (128, 64),
        "blk.0.ffn_up_exps.weight": (4, 128, 64),
    }
    assert not [pair for pair in block_pairs(experts, "blk.0.", 2) if "ffn" in pair.producers[0]]
    assert len(block_pairs(LLAMA, "blk.0.", 0)) == 3  # value heads of unknown number


def test_a_head_of_its_own_is_read_through_the_final_norm() -> None:
    shapes = {"output_norm.weight": (64,), "token_embd.weight": (100, 64)}
    assert head_pair(shapes) is None
    found = head_pair({**shapes, "output.weight": (100, 64)})
    assert found is not None
    assert found.producers == ("output_norm.weight",)
