"""Fixed scales from what arrives: the ranges that the methods ask for, and whether they help."""

import pytest
import torch
from torch import Tensor, nn

from tiny import random_tokens, tiny_model
from whit.calibration.ranges import RANGES, Histogram
from whit.errors import RecipeError
from whit.live.calibrate import METHODS, calibrate
from whit.live.inputs import Inputs
from whit.live.quantize import freeze, quantize
from whit.live.run import calls_of, divergence, hooked, log_probabilities, unrounded

BATCHES = [torch.tensor([random_tokens(32, seed)]) for seed in range(3)]


def inputs_of(model: nn.Module) -> dict[str, Inputs]:
    return {name: each for name, each in model.named_modules() if isinstance(each, Inputs)}


def arriving(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """What arrives at every quantized layer while activations are not rounded, by hooks of our own."""
    seen: dict[str, list[Tensor]] = {}
    for each in inputs_of(model).values():
        each.enabled = False
    with torch.no_grad(), hooked(inputs_of(model), lambda key, x: seen.setdefault(key, []).append(x.flatten())):
        for batch in batches:
            model(batch)
    for each in inputs_of(model).values():
        each.enabled = True
    return {key: torch.cat(several) for key, several in seen.items()}


def prepared(name: str = "llama", activations: str = "qint8") -> nn.Module:
    model = tiny_model(name)
    quantize(model, "qint8", activations)
    return model


def run(model: nn.Module, batches: list[Tensor] = BATCHES) -> None:
    with torch.no_grad():
        for batch in batches:
            model(batch)


@pytest.mark.parametrize(("activations", "top"), [("qint8", 127), ("qfloat8", 448)])
@pytest.mark.parametrize("frozen", [False, True])
def test_minmax_scales_are_the_largest_value_over_the_largest_code(frozen: bool, activations: str, top: int) -> None:
    model = prepared(activations=activations)
    if frozen:
        freeze(model)
    expected = arriving(model, BATCHES)
    with calibrate(model) as result:
        run(model)
    for name, each in inputs_of(model).items():
        assert each.scale.item() == pytest.approx(expected[name].abs().max().item() / top, rel=1e-5)
        assert result.scales[name] == "minmax"


@pytest.mark.parametrize("method", RANGES)
def test_every_method_cuts_where_its_range_says(method: str) -> None:
    model = prepared()
    expected = arriving(model, BATCHES)
    with calibrate(model, method):
        run(model)
    for name, each in inputs_of(model).items():
        histogram = Histogram()
        histogram.add(expected[name])
        assert each.scale.item() == pytest.approx(RANGES[method](histogram, 8) / 127, rel=0.02)


def test_while_it_lasts_activations_are_not_rounded_and_afterwards_they_are() -> None:
    model = prepared()
    with torch.no_grad():
        per_token = model(BATCHES[0]).logits
        with calibrate(model):
            inside = model(BATCHES[0]).logits
        static = model(BATCHES[0]).logits
    assert not torch.equal(inside, per_token)
    assert not torch.equal(static, inside)
    assert all(each.observer is None and each.enabled for each in inputs_of(model).values())


def test_layers_that_saw_nothing_keep_a_scale_per_token() -> None:
    model = nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.Linear(16, 8)})
    quantize(model, "qint8", "qint8")
    with torch.no_grad(), calibrate(model) as result:
        model["a"](torch.ones(2, 16))
    assert result.scales == {"a.inputs": "minmax", "b.inputs": "per token"}
    assert model["a"].inputs.static
    assert not model["b"].inputs.static


def test_a_calibration_replaces_an_earlier_one() -> None:
    model = prepared()
    with calibrate(model):
        run(model)
    first = {name: each.scale.clone() for name, each in inputs_of(model).items()}
    with calibrate(model):
        run(model, BATCHES[:1])
    assert all(each.scale <= first[name] for name, each in inputs_of(model).items())
    assert any(each.scale < first[name] for name, each in inputs_of(model).items())


def test_an_error_inside_leaves_everything_as_it_was() -> None:
    model = prepared()
    with calibrate(model):
        run(model)
    before = {name: each.scale.clone() for name, each in inputs_of(model).items()}
    with pytest.raises(IndexError), calibrate(model):
        run(model, [BATCHES[0][:, :3], torch.tensor([[999]])])  # a token that is not there
    for name, each in inputs_of(model).items():
        assert torch.equal(each.scale, before[name])
        assert each.observer is None
        assert each.enabled


def test_unknown_methods_and_models_without_activations_are_refused() -> None:
    with pytest.raises(RecipeError, match="minmax, percentile, mse, kl, auto"), calibrate(prepared(), "entropy"):
        pass
    model = tiny_model("llama")
    quantize(model, "qint8")
    with pytest.raises(RecipeError, match="No activations"), calibrate(model):
        pass
    assert set(METHODS) == {*RANGES, "auto"}


@pytest.mark.parametrize("options", [{"method": "auto"}, {"smooth": True}])
def test_what_tries_the_model_needs_it_to_be_called(options: dict) -> None:
    model = prepared()
    with pytest.raises(RecipeError, match="not called"), calibrate(model, **options):
        pass
    assert all(each.enabled and each.observer is None for each in inputs_of(model).values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_auto_is_never_worse_than_the_best_method_and_says_what_it_measured(name: str) -> None:
    model = prepared(name)
    with calibrate(model, "auto") as result:
        run(model, BATCHES[:2])
    assert set(result.divergence) == {"per token", "auto", *RANGES}
    assert result.divergence["auto"] <= min(result.divergence[method] for method in RANGES)
    assert result.divergence["auto"] <= 1.1 * result.divergence["per token"]
    calls = calls_of(BATCHES[:2])
    for each in inputs_of(model).values():
        each.enabled = False
    reference = log_probabilities(model, calls)
    for each in inputs_of(model).values():
        each.enabled = True
    assert divergence(model, calls, reference) == pytest.approx(result.divergence["auto"], rel=1e-3, abs=1e-9)
    for key, each in inputs_of(model).items():
        assert each.static == (result.scales[key] in RANGES)


def test_auto_gives_a_scale_per_token_back_where_a_fixed_one_hurts() -> None:
    """One token is a thousand times the others: with one scale for all they vanish."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))
    quantize(model, "qint8", "qint8")
    x = torch.randn(64, 32)
    x[5] *= 1000
    with torch.no_grad(), calibrate(model, "auto") as result:
        model(x)
    assert result.scales == {"0.inputs": "per token", "2.inputs": result.scales["2.inputs"]}
    assert result.divergence["auto"] < result.divergence["minmax"]


def test_of_generating_auto_sees_the_prompt() -> None:
    model = prepared()
    with calibrate(model, "auto") as result:
        model.generate(BATCHES[0], max_new_tokens=3, do_sample=False)
    assert result.divergence["minmax"] > 0


def test_fixed_scales_stay_near_the_original() -> None:
    model = tiny_model("gpt2")
    quantize(model, "qint8", "qint8")
    with torch.no_grad(), unrounded(model):
        exact = model(BATCHES[0]).logits
    with calibrate(model, "mse"):
        run(model)
    with torch.no_grad():
        assert (model(BATCHES[0]).logits - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_calibrated_models_freeze_to_what_they_were() -> None:
    model = prepared("gpt2")
    with calibrate(model):
        run(model)
    with torch.no_grad():
        before = model(BATCHES[0]).logits
        freeze(model)
        after = model(BATCHES[0]).logits
    assert (before - after).abs().mean() < 0.01 * before.abs().mean()  # codes flip on the last bit


def test_norms_that_no_quantized_layer_reads_are_left_alone() -> None:
    """Qwen3's norms of single heads go into attention, not into a layer."""
    model = tiny_model("qwen3")
    quantize(model, "qint8", "qint8")
    with torch.no_grad(), calibrate(model) as result:
        model(torch.tensor([random_tokens(24)]))
    unread = {name for name, how in result.scales.items() if how.startswith("no quantized layer")}
    assert unread == {f"model.layers.{k}.self_attn.{which}_norm.outputs" for k in range(2) for which in "qk"}
    assert not any(model.get_submodule(name).static for name in unread)


def test_trials_are_made_with_nothing_dropped() -> None:
    """Which norms can take factors, and which scales are best, is compared on predictions."""
    found = []
    for training in (False, True):
        model = prepared("gpt2").train(training)
        with calibrate(model, "auto", smooth=True) as result:
            model.eval()
            run(model)
            model.train(training)
        found.append((result.smoothed, result.scales, result.divergence))
        assert model.training == training
    assert found[0][0] > 0
    assert found[0] == found[1]


def test_a_calibration_within_another_is_refused_and_the_outer_one_goes_on() -> None:
    model = prepared()
    with calibrate(model) as result:
        run(model)
        with pytest.raises(RecipeError, match="already"), calibrate(model):
            pass
    assert set(result.scales.values()) == {"minmax"}


def test_norms_that_return_more_than_their_output() -> None:
    """Such as the sum that they were given, beside it."""

    class BothNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = BothNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y, kept = self.norm(x)
            return self.linear(y) + kept

    model, x = Block(), torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    quantize(model, "qint8", "qint8")
    with torch.no_grad(), calibrate(model) as result:
        model(x)
    assert result.scales == {"norm.outputs": "minmax", "linear.inputs": "minmax"}
    assert torch.equal(model.norm(x)[1], x)
    codes = model.norm(x)[0] / model.norm.outputs.scale
    assert torch.allclose(codes, codes.round(), atol=1e-4)
