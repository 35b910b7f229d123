"""Rescaled columns are found and taken back, whatever else is wrong."""

from pathlib import Path

import pytest
import torch

from tiny import save_tiny
from whit.models.open import open_model
from whit.pipeline.frame import Frame, by_block
from whit.pipeline.quantize import model_view


@pytest.fixture
def tensors(tmp_path: Path) -> tuple[Frame, dict[str, torch.Tensor]]:
    save_tiny("llama", tmp_path)
    view = model_view(open_model(tmp_path))
    return Frame(view), {tensor.name: tensor.read() for tensor in view.tensors if tensor.name.startswith("blk.0.")}


def rescaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    t = torch.linspace(-1, 1, 64).exp()
    out = {name: W.clone() for name, W in tensors.items()}
    out["blk.0.attn_norm.weight"] /= t
    for part in ("q", "k", "v"):
        out[f"blk.0.attn_{part}.weight"] *= t
    u = torch.linspace(1, -1, 96).exp()
    out["blk.0.ffn_up.weight"] /= u[:, None]
    out["blk.0.ffn_down.weight"] *= u
    return out


def test_factors_are_taken_back(tensors: tuple[Frame, dict[str, torch.Tensor]]) -> None:
    frame, W = tensors
    written = rescaled(W)
    frame.find(list(W), "blk.0.", written, W)
    for name in W:
        torch.testing.assert_close(frame.undo(name, written[name]), W[name], rtol=1e-4, atol=1e-6)


def test_one_wrong_tensor_is_outvoted(tensors: tuple[Frame, dict[str, torch.Tensor]]) -> None:
    frame, W = tensors
    written = rescaled(W)
    written["blk.0.attn_norm.weight"] = W["blk.0.ffn_norm.weight"]
    frame.find(list(W), "blk.0.", written, W)
    for name in ("blk.0.attn_q.weight", "blk.0.attn_v.weight"):
        torch.testing.assert_close(frame.undo(name, written[name]), W[name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(frame.undo("blk.0.attn_norm.weight", written["blk.0.attn_norm.weight"]), W[name][0], 0.1)


def test_nothing_is_found_where_nothing_was_rescaled(tensors: tuple[Frame, dict[str, torch.Tensor]]) -> None:
    frame, W = tensors
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: each + 0.1 * each.std() * torch.randn(each.shape, generator=generator) if each.dim() > 1 else each
        for name, each in W.items()
    }
    frame.find(list(W), "blk.0.", noisy, W)
    assert frame.columns == {}
    assert frame.rows == {}


def test_tensors_by_block() -> None:
    names = ["token_embd.weight", "blk.0.attn_q.weight", "blk.10.attn_q.weight", "blk.0.attn_k.weight"]
    assert by_block(names) == {"": names[:1], "blk.0.": [names[1], names[3]], "blk.10.": [names[2]]}
