"""Values in either direction between a file's tensors and a module's parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from tiny import save_tiny
from whit.models.links import Links
from whit.models.open import open_model
from whit.pipeline.quantize import model_view


def test_a_stack_of_experts_is_read_anew_when_it_is_replaced(tmp_path: Path) -> None:
    module = save_tiny("mixtral", tmp_path)
    view = model_view(open_model(tmp_path))
    links, name = Links(view), "blk.1.ffn_down_exps.weight"
    tensor = next(tensor for tensor in view.tensors if tensor.name == name)
    (parameter,) = dict.fromkeys(slot for slot, _ in links.slots(name))
    shape = tuple(module.get_parameter(parameter).shape)
    before = links.read(parameter, shape)
    links.replace(name, 2 * tensor.read())
    assert torch.equal(links.read(parameter, shape), 2 * before)
    links.replace(name, 3 * tensor.read())
    assert torch.equal(links.read(parameter, shape), 3 * before)
    links.restore()
    assert torch.equal(links.read(parameter, shape), before)
