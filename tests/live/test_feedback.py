"""Error feedback on a live model: less error at the outputs of layers, the same float function, chosen codes kept."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tiny import TINY, random_tokens, tiny_model
from whit.live.feedback import feedback
from whit.live.inputs import Inputs
from whit.live.modules import QEmbedding
from whit.live.quantize import freeze, quantize, twins_of
from whit.live.run import calls_of, divergence, hooked, log_probabilities, unrounded
from whit.live.twin import Twin
from whit.pipeline.effort import PRESETS
from whit.rounding.nearest import nearest

INTEGERS = ("qint8", "qint4", "qint3", "qint2")
TEXT = torch.tensor([random_tokens(48, seed) for seed in range(6)])
MODELS = ("llama", "llama-tied-biased", "gpt2", "gemma3_text", "phi3", "opt", "mixtral", "gpt_neox", "qwen3")


def moments(model: nn.Module, text: Tensor = TEXT) -> dict[str, Tensor]:
    """X^T X of what arrives at every matrix, float64."""
    found: dict[str, Tensor] = {}
    twins = {
        name: each
        for name, each in model.named_modules()
        if isinstance(each, Twin) and not isinstance(each, QEmbedding)
    }

    def seen(name: str, x: Tensor) -> None:
        X = x.detach().flatten(0, -2).double()
        found[name] = found.get(name, torch.zeros(())) + X.T @ X

    with torch.no_grad(), hooked(twins, seen):
        for ids in text.split(1):
            model(ids)
    return found


def damage(D: Tensor, H: Tensor) -> float:
    return (D.double() @ H * D.double()).sum().item()


def lone(cols: int = 64, rows: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(cols, rows))


def correlated(n: int = 200, cols: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, n, 8, generator=generator) @ torch.randn(8, cols, generator=generator) + 0.1 * torch.randn(
        1, n, cols, generator=generator
    )


@pytest.mark.parametrize("weights", [*INTEGERS, "nf4", "fp4", "mxfp4", "nvfp4", "qfloat8", "qfloat8_e5m2"])
def test_the_error_at_the_output_is_far_below_that_of_nearest(weights: str) -> None:
    x = correlated()
    H = (x[0].T @ x[0]).double()
    errors = []
    for method in ("nearest", "feedback"):
        model = lone()
        W = model[0].weight.detach().clone()
        quantize(model, weights, method=method, calibration=[x])
        errors.append(damage(model[0].seen().detach() - W, H))
    assert errors[1] < (0.7 if weights not in ("qfloat8", "qfloat8_e5m2", "mxfp4") else 0.9) * errors[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_model_loses_less_at_its_output(name: str) -> None:
    """Added up over layers; columns are not rescaled, so that both start from the same weights."""
    plain, better = tiny_model(name), tiny_model(name)
    quantize(plain, "qint3")
    quantize(better, "qint3")
    W = {key: each.matrix.detach().clone() for key, each in plain.named_modules() if isinstance(each, Twin)}
    effort = copy.copy(PRESETS["fast"].effort)
    object.__setattr__(effort, "rescale", False)
    twins = {key: each for key, each in better.named_modules() if isinstance(each, Twin)}
    feedback(better, twins, calls_of(TEXT), effort)
    with unrounded(plain):
        H = moments(plain)
    before = {key: damage(plain.get_submodule(key).seen().detach() - W[key], H[key]) for key in H}
    rounded = {key: damage(better.get_submodule(key).seen().detach() - W[key], H[key]) for key in H}
    relative = sum(rounded[key] / before[key] for key in H if before[key] > 0) / len(H)
    assert relative < 0.8


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_predictions_are_nearer_than_with_nearest(name: str) -> None:
    calls, found = calls_of(TEXT), {}
    reference = log_probabilities(tiny_model(name), calls)
    for method in ("nearest", "feedback"):
        model = tiny_model(name)
        quantize(model, "qint4", method=method, calibration=TEXT)
        found[method] = divergence(model, calls, reference)
    assert found["feedback"] < found["nearest"]


@pytest.mark.parametrize("name", MODELS)
def test_many_bits_give_back_the_float_function(name: str) -> None:
    """Rescaled columns and norms cancel: at 8 bits nothing but rounding is left."""
    model, calls = tiny_model(name), calls_of(TEXT)
    reference = log_probabilities(model, calls)
    quantize(model, "qint8", method="feedback", calibration=TEXT)
    assert divergence(model, calls, reference) < 5e-3  # tokens may go to another expert


@pytest.mark.parametrize("name", MODELS)
def test_freezing_keeps_the_chosen_codes(name: str) -> None:
    model = tiny_model(name)
    quantize(model, "qint3", method="feedback", calibration=TEXT[:2])
    with torch.no_grad():
        before = model(TEXT[:1]).logits
        expected = [each.seen().clone() for each in twins_of(model)]
        freeze(model)
        after = model(TEXT[:1]).logits
    assert (before - after).abs().max() < 1e-4 * before.abs().max()
    for twin, Q in zip(twins_of(model), expected, strict=True):
        assert torch.equal(twin.matrix, Q)


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2"])
def test_tied_layers_share_what_was_chosen(name: str) -> None:
    model = tiny_model(name)
    quantize(model, "qint4", method="feedback", calibration=TEXT[:2])
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert torch.equal(head.seen(), embedding.seen())
    freeze(model)
    assert head.frozen is embedding.frozen


@pytest.mark.parametrize("weights", ["kmeans4", "kmeans3", "kmeans2", "kmeans2-g32", "kmeans3-tensor", "kmeans2+2%"])
def test_tables_are_rounded_with_feedback(weights: str) -> None:
    x = correlated() * torch.logspace(-1, 1, 64)
    H = (x[0].T @ x[0]).double()
    errors = []
    for method in ("nearest", "feedback"):
        model = lone()
        W = model[0].weight.detach().clone()
        quantize(model, weights, method=method, calibration=[x])
        errors.append(damage(model[0].seen().detach() - W, H))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("activations", [None, "qint8"])
def test_activations_stay_as_they_were(activations: str | None) -> None:
    model = tiny_model("llama")
    quantize(model, "qint4", activations, method="feedback", calibration=TEXT[:2])
    assert all(each.enabled and not each.static for each in model.modules() if isinstance(each, Inputs))
    assert all(each.active for each in twins_of(model))


def test_a_model_without_a_list_of_blocks_is_rounded_as_a_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    x = torch.randn(1, 100, 32)
    with torch.no_grad():
        exact = model(x)
        quantize(model, "qint4", method="feedback", calibration=[x])
        found = model(x)
        plain = copy.deepcopy(model)
    for each in twins_of(plain):
        each.forget()
    assert (found - exact).square().mean() < 0.1 * exact.square().mean()


def test_texts_need_a_tokenizer_and_work_with_one() -> None:
    model = tiny_model("llama")

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 250 for letter in text]}

    steps: list[tuple[int, int, str]] = []
    quantize(
        model,
        "qint4",
        method="feedback",
        calibration=["a text of some length", "", "and another one"],
        tokenizer=tokenizer,
        progress=lambda *it: steps.append(it),
    )
    assert all(each.fixed is not None for each in twins_of(model))
    assert steps[0][:2] == (0, 3)
    assert steps[-1] == (3, 3, "done")


@pytest.mark.parametrize("batch", [TEXT[:2], {"input_ids": TEXT[:2]}, [TEXT[:1], {"input_ids": TEXT[1:2]}]])
def test_batches_of_every_kind(batch: object) -> None:
    model = tiny_model("llama")
    quantize(model, "qint4", method="feedback", calibration=batch)  # type: ignore[arg-type]
    assert all(each.fixed is not None for each in twins_of(model))


def test_only_the_layers_that_were_asked_for_are_rounded() -> None:
    model = tiny_model("llama")
    norm = model.model.layers[0].input_layernorm.weight.detach().clone()
    others = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    quantize(model, "qint4", method="feedback", calibration=TEXT[:2], include="*q_proj")
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, others)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, norm)
    assert model.model.layers[0].self_attn.q_proj.fixed is not None


def test_equal_calibrations_give_equal_codes() -> None:
    found = []
    for _ in range(2):
        model = tiny_model("mixtral")
        quantize(model, "qint3", method="feedback", calibration=TEXT[:2])
        found.append([each.quantized().codes for each in twins_of(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", TINY)
def test_blocks_are_found_in_every_architecture(name: str) -> None:
    """Rounded one after the other, each seeing what the rounded ones before it make of the text."""
    model = tiny_model(name)
    totals: list[int] = []
    quantize(
        model,
        "qint8",
        include=["*.q_proj", "*.c_attn", "*.qkv_proj", "*.query_key_value"],
        method="feedback",
        calibration=TEXT[:1],
        progress=lambda done, total, what: totals.append(total),
    )
    assert len(list(twins_of(model))) == model.config.num_hidden_layers
    assert totals[0] == model.config.num_hidden_layers + 1


def test_later_blocks_see_what_rounded_ones_make_of_the_text() -> None:
    """At two bits the second block's inputs are others than in float: rounding for these must be the better one."""
    model = tiny_model("llama")
    quantize(model, "qint2", method="feedback", calibration=TEXT)
    W = tiny_model("llama").model.layers[1].mlp.down_proj.weight
    found = model.model.layers[1].mlp.down_proj
    H = moments(model)["model.layers.1.mlp.down_proj"]
    plain = nearest(W.detach(), found.grid).dequantize()
    assert damage(found.seen().detach() - W, H) < damage(plain - W, H)


def test_nothing_is_dropped_while_text_is_looked_at() -> None:
    """A model that is training gives what it gives in evaluation, rescaled columns and all, and goes on training."""
    found = []
    for training in (False, True):
        model = tiny_model("gpt2").train(training)
        assert model.config.resid_pdrop > 0
        quantize(model, "qint4", method="feedback", calibration=TEXT[:2])
        found.append(model.state_dict())
        assert all(each.training == training for each in model.modules() if isinstance(each, nn.Dropout))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert not torch.equal(found[0]["transformer.h.0.ln_1.weight"], tiny_model("gpt2").transformer.h[0].ln_1.weight)


def test_padding_is_not_counted() -> None:
    """Whatever tokens it is made of, what is chosen is the same."""
    mask = torch.ones_like(TEXT[:2])
    mask[0, 20:] = 0
    found = []
    for padding in (0, 7):
        model = tiny_model("llama")
        ids = TEXT[:2].where(mask > 0, padding)
        quantize(model, "qint4", method="feedback", calibration=[{"input_ids": ids, "attention_mask": mask}])
        found.append([each.quantized().codes for each in twins_of(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
