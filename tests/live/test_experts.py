"""Blocks of experts compute what transformers' own do with every expert's matrices rounded."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from tiny import random_tokens, tiny_model
from whit.live.calibrate import calibrate
from whit.live.experts import QExpert, QExperts
from whit.live.quantize import freeze, n_bytes, quantize, twins_of
from whit.live.types import TYPES, qint4, qint8
from whit.rounding.nearest import nearest

TOKENS = torch.tensor([random_tokens(24)])
NAMES = ("mixtral", "qwen3_moe", "gpt_oss")


def model_named(name: str) -> PreTrainedModel:
    """With biases that matter where there are some."""
    if name != "gpt_oss":
        return tiny_model(name)
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=64,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = 0.2 if value.dim() == 1 or key.endswith("bias") else value.shape[-1] ** -0.5
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key))) * scale)
            if "norm" in key:
                value.add_(1)
    return model


def rounded_by_hand(model: PreTrainedModel, grid_name: str) -> PreTrainedModel:
    """Every expert's matrix replaced, in transformers' own model."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in other.modules():
            for key in ("gate_up_proj", "down_proj"):
                stack = module._parameters.get(key)
                if stack is None or stack.dim() != 3:
                    continue
                turned = getattr(module, "is_transposed", False)
                for expert in stack:
                    W = expert.T if turned else expert
                    W.copy_(nearest(W.contiguous(), TYPES[grid_name]).dequantize())
    return other


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def close_on_average(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Where inputs are rounded, a token may go to another expert."""
    assert (a - b).abs().mean() <= tolerance * b.abs().mean()


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, kind) for name in NAMES for kind in ("qint8", "mxfp4")), ("mixtral", "kmeans2")]
)
def test_experts_are_multiplied_rounded_frozen_or_not(name: str, kind: str) -> None:
    model = model_named(name)
    expected = logits(rounded_by_hand(model, kind))
    assert (expected - logits(model)).abs().max() > 0
    report = quantize(model, kind, include="*experts")
    assert {each.twin for each in report.replaced} == {"QExperts"}
    close(logits(model), expected)
    freeze(model)
    close(logits(model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_router_is_left_alone_and_named(name: str) -> None:
    report = quantize(model_named(name), qint8)
    routers = [each for each in report.left if each.name.endswith(("gate", "router"))]
    assert len(routers) == 2
    assert all("router" in each.reason for each in routers)


@pytest.mark.parametrize("name", NAMES)
def test_every_expert_is_a_twin_with_its_own_codes(name: str) -> None:
    model = model_named(name)
    quantize(model, qint4)
    experts = [each for each in twins_of(model) if isinstance(each, QExpert)]
    assert len(experts) == 2 * 4 * 2
    freeze(model)
    assert len({id(each.frozen) for each in experts}) == len(experts)


def test_memory_falls() -> None:
    model = model_named("mixtral")
    before = n_bytes(model)
    quantize(model, qint8)
    assert freeze(model).after < 0.31 * before


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_experts_that_tokens_went_to(name: str) -> None:
    model, plain = model_named(name), rounded_by_hand(model_named(name), "qint8")
    quantize(model, qint8, include="*experts")
    for each in (model, plain):
        each(TOKENS).logits.square().mean().backward()
    home = "model.layers.1.mlp.experts"
    wanted = plain.get_parameter(f"{home}.down_proj").grad
    found = [model.get_parameter(f"{home}.stacks.down_proj.{k}.weight").grad for k in range(4)]
    for mine, theirs in zip(found, wanted, strict=True):
        close(torch.zeros_like(theirs) if mine is None else mine, theirs, 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_quantized_inputs_of_experts_are_calibrated(name: str) -> None:
    model = model_named(name)
    quantize(model, qint8, qint8)
    plain = logits(model)
    with torch.no_grad(), calibrate(model):
        model(TOKENS)
    used = [each for each in twins_of(model) if isinstance(each, QExpert) and each.inputs.static]
    assert used
    close_on_average(logits(model), plain, 0.15)
    unfrozen = logits(model)
    freeze(model)
    close_on_average(logits(model), unfrozen, 0.05)


@pytest.mark.parametrize("name", NAMES)
def test_copies_casts_and_state_dicts(name: str) -> None:
    model = model_named(name)
    quantize(model, qint8)
    freeze(model)
    other = model_named(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    quantize(other, qint8)
    freeze(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    exact = logits(model)
    assert logits(model.bfloat16()).dtype == torch.bfloat16
    close_on_average(logits(model).float(), exact, 0.2)


def test_stand_ins_are_no_part_of_what_is_saved_or_printed() -> None:
    model = model_named("mixtral")
    quantize(model, qint8)
    block = next(each for each in model.modules() if isinstance(each, QExperts))
    assert not any(name.startswith("inner.") for name in block.state_dict())
    assert "QExpert" in repr(model)


def test_copies_of_a_block_have_experts_of_their_own() -> None:
    model = model_named("mixtral")
    quantize(model, qint8)
    before = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), before)
        with torch.no_grad():
            for each in twins_of(other):
                if isinstance(each, QExpert):
                    each.weight.zero_()
        assert not torch.equal(logits(other), before)
        assert torch.equal(logits(model), before)


def test_threads_call_one_model_at_the_same_time() -> None:
    model = model_named("mixtral")
    quantize(model, qint8)
    freeze(model)
    expected = logits(model)
    block = next(each for each in model.modules() if isinstance(each, QExperts))
    other = ThreadPoolExecutor(1)

    def call(*_: object) -> None:  # another thread's whole call, in the middle of this one's
        handle.remove()
        assert torch.equal(other.submit(logits, model).result(), expected)

    expert = next(each for each in block.modules() if isinstance(each, QExpert))
    handle = expert.register_forward_pre_hook(call)
    assert torch.equal(logits(model), expected)
    other.shutdown()


def test_weights_that_were_not_to_be_trained_stay_so() -> None:
    model = model_named("mixtral").requires_grad_(False)
    quantize(model, qint8)
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Queries(nn.Module):
    """A parameter of three dimensions that is no stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.act_fn, self.layer = nn.Parameter(torch.ones(1, 4, 64)), nn.GELU(), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.act_fn(self.layer(x + self.query))


class Convolution(nn.Conv1d):
    """With an activation of its own."""

    act_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act_fn(super().forward(x))


@pytest.mark.parametrize("module", [Queries(), Convolution(4, 4, 3)])
def test_other_parameters_of_three_dimensions_are_left_in_float(module: nn.Module) -> None:
    model, x = nn.Sequential(module), torch.randn(2, 4, 64)
    report = quantize(model, qint8)
    assert not any(isinstance(each, QExperts) for each in model.modules())
    assert "no layer" in next(each.reason for each in report.left if each.name == "0")
    assert torch.isfinite(model(x)).all()


def test_experts_that_are_multiplied_all_at_once_are_left_in_float() -> None:
    config = Llama4TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=1,
        head_dim=16, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, moe_layers=[0],
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).eval()
    report = quantize(model, qint8)
    assert next(each.reason for each in report.left if each.name.endswith("experts")).startswith("experts that are not")
    assert torch.isfinite(logits(model)).all()


def test_a_block_without_a_mark_is_known_by_its_parameters() -> None:
    """Such as those of Step 3.7: the loop is there, transformers says nothing of it."""
    block = tiny_model("mixtral").model.layers[0].mlp.experts
    del block.is_transposed
    assert quantize(nn.Sequential(block), qint8).replaced[0].twin == "QExperts"
