"""Blocks one at a time against transformers' whole model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tiny import TINY, random_tokens, save_tiny
from whit.models.architecture import gguf_view
from whit.models.links import Links
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.models.stream import BlockStream
from whit.models.taps import Slot, watched


def windows() -> Tensor:
    return torch.tensor(random_tokens(24)).view(2, 12)


@pytest.mark.parametrize("name", TINY)
def test_streamed_hidden_states_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = open_model(tmp_path)
    stream = BlockStream(model, Links(gguf_view(model)).read)
    hidden = stream.start(windows())
    for index in range(stream.n_blocks):
        stream.fill(index)
        hidden = [stream.run(index, window) for window in hidden]
        stream.empty(index)
    decoder = load_module(model).get_decoder()  # type: ignore[operator]
    for window, states in zip(windows(), hidden, strict=True):
        with torch.inference_mode():
            whole = decoder(input_ids=window[None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(stream.final(states), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3-pattern", "gpt_neox", "gpt2"])
def test_attention_is_fused_where_that_is_the_same(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = open_model(tmp_path)
    stream = BlockStream(model, Links(gguf_view(model)).read)
    hidden = stream.start(windows())[0]
    stream.fill(0)
    plain = stream.run(0, hidden)
    assert stream.fuse_attention(hidden) == (name != "gemma2")  # which caps its scores
    torch.testing.assert_close(stream.run(0, hidden), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_every_matrix_of_the_file_has_a_tap_of_its_width(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = open_model(tmp_path)
    view = gguf_view(model)
    links = Links(view)
    stream = BlockStream(model, links.read)
    hidden = stream.start(windows())
    widths: dict[Slot, int] = {}
    for index in range(stream.n_blocks):
        block, prefix = stream.fill(index), stream.prefix(index)
        with watched(block, lambda slot, x, at=prefix: widths.update({(at + slot[0], slot[1]): x.shape[-1]})):
            hidden = [stream.run(index, window) for window in hidden]
    for tensor in view.tensors:
        if tensor.name.startswith("blk.") and not tensor.keep_float:
            slots = [slot for slot in links.slots(tensor.name) if slot in widths or slot[1] is None]
            assert slots, tensor.name
            assert all(widths[slot] == tensor.shape[-1] for slot in slots if slot in widths), tensor.name


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_a_replaced_tensor_changes_the_parameters_that_it_is_made_of_and_no_others(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = open_model(tmp_path)
    view = gguf_view(model)
    links = Links(view)
    chosen = next(tensor for tensor in view.tensors if tensor.name.startswith("blk.1.") and not tensor.keep_float)
    parameters = {n: tuple(p.shape) for n, p in load_module(model).named_parameters() if ".1." in n}
    before = {n: links.read(n, shape) for n, shape in parameters.items()}
    links.replace(chosen.name, torch.zeros(chosen.shape))
    changed = {n for n, shape in parameters.items() if not torch.equal(links.read(n, shape), before[n])}
    assert changed == {slot[0] for slot in links.slots(chosen.name)}
    links.restore()
    assert all(torch.equal(links.read(n, shape), before[n]) for n, shape in parameters.items())


def test_weights_that_are_given_the_same_tensor_see_the_same_object() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    seen: dict[str, Tensor] = {}
    block = Two()
    with watched(block, lambda slot, x: seen.update({slot[0]: x})):
        block(torch.ones(1, 4))
    assert seen["a.weight"] is seen["b.weight"]
    assert seen["c.weight"] is not seen["a.weight"]
