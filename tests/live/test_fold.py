"""Norms and the layers after them: which can be rescaled, and that nothing else changes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tiny import random_tokens, tiny_model
from whit.live.fold import Pair, fold, pairs_of
from whit.live.quantize import freeze, quantize, twins_of
from whit.live.run import Call, unrounded

TOKENS = torch.tensor([random_tokens(24)])
CALL = Call((TOKENS,), {})
FOUND = {
    "llama": {"input_layernorm", "post_attention_layernorm", "norm"},
    "llama-tied-biased": {"input_layernorm", "post_attention_layernorm"},  # the head is the embedding too
    "gpt2": {"ln_1", "ln_2"},
    "gemma3_text": {"input_layernorm", "pre_feedforward_layernorm"},
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm"},
    "phi3": {"input_layernorm", "post_attention_layernorm", "norm"},
    "opt": {"self_attn_layer_norm", "final_layer_norm"},
    "mixtral": {"input_layernorm", "norm"},  # the router sees what the other returns
    "gpt_neox": {"input_layernorm", "post_attention_layernorm", "final_layer_norm"},
    "qwen3": {"input_layernorm", "post_attention_layernorm", "norm"},  # norms of heads are followed by no layer
}


def prepared(name: str, weights: str = "qint8") -> nn.Module:
    """With weights of norms that are no multiples of anything."""
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    quantize(model, weights, "qint8")
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad(), unrounded(model):
        return model(TOKENS).logits


def factors(pair: Pair, seed: int = 2) -> Tensor:
    n = pair.norm.weight.shape[0]  # type: ignore[union-attr, index]
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)).mul(3).sub(1.5).exp()


@pytest.mark.parametrize("name", FOUND)
def test_the_norms_that_can_be_folded_are_found(name: str) -> None:
    assert {pair.name.rpartition(".")[2] for pair in pairs_of(prepared(name), CALL)} == FOUND[name]


@pytest.mark.parametrize("name", FOUND)
def test_looking_changes_no_bit(name: str) -> None:
    model = prepared(name)
    before = copy.deepcopy(model.state_dict())
    pairs_of(model, CALL)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", FOUND)
def test_any_factors_leave_the_function_alone(name: str) -> None:
    model = prepared(name)
    exact = logits(model)
    pairs = pairs_of(model, CALL)
    for pair in pairs:
        fold(pair, factors(pair))
    assert (logits(model) - exact).abs().max() < 1e-4 * exact.abs().max()
    assert all(each.weight.std() > 0 for pair in pairs for each in pair.consumers)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_columns_are_multiplied(name: str) -> None:
    model = prepared(name)
    pair = pairs_of(model, CALL)[0]
    before = [each.matrix.detach().clone() for each in pair.consumers]
    t = factors(pair)
    fold(pair, t)
    for twin, W in zip(pair.consumers, before, strict=True):
        assert torch.allclose(twin.matrix, W * t)


def test_consumers_of_one_norm_come_together() -> None:
    model = prepared("llama")
    pairs = {pair.name: pair for pair in pairs_of(model, CALL)}
    attention = model.model.layers[0].self_attn
    assert set(pairs["model.layers.0.input_layernorm"].consumers) == {
        attention.q_proj, attention.k_proj, attention.v_proj
    }  # fmt: skip
    assert [pair.plus_one for pair in pairs.values()] == [False] * len(pairs)
    assert all(pair.plus_one for pair in pairs_of(prepared("gemma3_text"), CALL))


def test_bfloat16_norms_keep_every_bit_while_they_are_looked_at() -> None:
    model = prepared("gemma3_text").bfloat16()
    before = copy.deepcopy(model.state_dict())
    pairs_of(model, CALL)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_layers_whose_codes_are_chosen_are_left_alone() -> None:
    model = tiny_model("llama")
    quantize(model, "qint4", method="search", include="*q_proj")
    quantize(model, "qint4")
    chosen = {name: each.fixed for name, each in model.named_modules() if name.endswith("q_proj")}
    found = {pair.name.rpartition(".")[2] for pair in pairs_of(model, CALL)}
    assert found == {"post_attention_layernorm", "norm"}
    assert all(model.get_submodule(name).fixed is each for name, each in chosen.items())


def test_frozen_layers_have_no_columns_to_multiply() -> None:
    model = prepared("llama")
    freeze(model)
    assert pairs_of(model, CALL) == []
    assert all(each.frozen for each in twins_of(model))
