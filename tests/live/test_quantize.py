"""Whole models: what is replaced, what is left, what stays tied, what comes out, before and after freezing."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tiny import random_tokens, tiny_model
from whit.errors import BadWeightsError, RecipeError
from whit.grids.named import grid_named
from whit.live.experts import QExpert
from whit.live.modules import QConv1D, QEmbedding, QLinear
from whit.live.quantize import METHODS, freeze, n_bytes, quantize, twins_of
from whit.live.twin import Twin
from whit.live.types import TYPES, grouped, qint4, qint8
from whit.rounding.nearest import nearest, search

TOKENS = torch.tensor([random_tokens(24)])
TIED = ("llama-tied-biased", "gpt2", "gemma3_text")
MODELS = ("llama", *TIED, "opt", "phi3", "mixtral", "gpt_neox")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def rounded_by_hand(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """transformers' own model with every matrix of a layer replaced by its nearest points."""
    other, done = copy.deepcopy(model), set[int]()
    with torch.no_grad():
        for module in other.modules():
            for value in module._parameters.values():
                is_layer = isinstance(module, nn.Linear | nn.Embedding | Conv1D) and value is not None
                is_layer = is_layer and value.dim() == 2 and "Positional" not in type(module).__name__
                if not (is_layer or (value is not None and value.dim() == 3)) or id(value) in done:
                    continue
                done.add(id(value))
                for W in value if value.dim() == 3 else [value.T if isinstance(module, Conv1D) else value]:
                    W.copy_(nearest(W.contiguous(), TYPES[weights]).dequantize())
    return other


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 50))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_does_with_its_matrices_rounded(name: str) -> None:
    model = tiny_model(name)
    expected = logits(rounded_by_hand(model, "qint8"))
    quantize(model, qint8)
    close(logits(model), expected)
    freeze(model)
    close(logits(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_all_matrices_of_layers_are_replaced(name: str) -> None:
    model = tiny_model(name)
    report = quantize(model, qint8)
    left = [each for each in model.modules() if type(each).__name__ in ("Linear", "Conv1D", "Embedding")]
    assert not left
    reasons = {each.kind: each.reason for each in report.left}
    assert all(reasons.values())
    if name == "opt":
        assert "computes something else" in reasons["OPTLearnedPositionalEmbedding"]


def test_everything_with_parameters_is_named_once() -> None:
    for name in ("llama", "mixtral", "opt", "gpt2"):
        model = tiny_model(name)
        owners = {key for key, each in model.named_modules() if any(True for _ in each.parameters(recurse=False))}
        report = quantize(model, qint8, exclude="*down_proj")
        named = [each.name for each in (*report.replaced, *report.left)]
        assert len(named) == len(set(named))
        assert owners == set(named)


@pytest.mark.parametrize("name", TIED)
def test_tied_heads_stay_tied(name: str) -> None:
    model = tiny_model(name)
    quantize(model, qint8)

    def twins(some: nn.Module) -> tuple[Twin, Twin]:
        head, embedding = some.get_output_embeddings(), some.get_input_embeddings()  # type: ignore[operator]
        assert isinstance(head, QLinear)
        assert isinstance(embedding, QEmbedding)
        return head, embedding

    for each in (model, copy.deepcopy(model), copy.deepcopy(model).bfloat16()):
        head, embedding = twins(each)
        assert head.weight is embedding.weight
    freeze(model)
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).bfloat16()):
        head, embedding = twins(each)
        assert head.frozen is embedding.frozen
        assert head.frozen is not None
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_training_a_tied_head_trains_the_embedding() -> None:
    model = tiny_model("llama-tied-biased")
    quantize(model, qint8)
    model(TOKENS).logits.square().mean().backward()
    used = torch.zeros(256, dtype=torch.bool)
    used[TOKENS[0]] = True
    gradient = model.lm_head.weight.grad
    assert gradient is model.model.embed_tokens.weight.grad
    assert (gradient.abs().sum(1) > 0).all()


@pytest.mark.parametrize("method", ["nearest", "search"])
@pytest.mark.parametrize("name", TIED)
def test_tied_layers_have_the_same_codes(name: str, method: str) -> None:
    model = tiny_model(name)
    quantize(model, "qint3", include=["*lm_head", "*embed*", "*wte"], method=method)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert torch.equal(head.seen(), embedding.seen())
    expected = head.seen().detach().clone()
    freeze(model)
    assert torch.equal(head.matrix, expected)


@pytest.mark.parametrize("method", ["search", "feedback"])
@pytest.mark.parametrize("excluded", ["*embed*", "lm_head"])
def test_codes_are_not_written_to_a_tied_layer_that_is_excluded(excluded: str, method: str) -> None:
    model = tiny_model("qwen2-tied")
    before = model.lm_head.weight.detach().clone()
    report = quantize(model, TYPES["qint2"], exclude=excluded, method=method, calibration=TOKENS)
    head, embedding = model.lm_head, model.model.embed_tokens
    kept, other = (embedding, head) if excluded == "*embed*" else (head, embedding)
    assert torch.equal(kept.weight, before)
    assert isinstance(other, Twin)
    assert [model.get_submodule(each.name) for each in report.replaced if "no longer tied" in each.note] == [other]
    seen = other.seen().detach().clone()
    freeze(model)
    assert torch.equal(other.weight, seen)
    assert torch.equal(kept.weight, before)


def test_tied_layers_on_two_grids_have_the_codes_that_each_would_have_alone() -> None:
    model = tiny_model("qwen2-tied")
    W = model.lm_head.weight.detach().clone()
    quantize(model, qint8, include="*embed*", method="search")
    quantize(model, qint4, include="lm_head", method="search")
    assert torch.equal(model.model.embed_tokens.seen(), search(W, qint8).dequantize())
    assert torch.equal(model.lm_head.seen(), search(W, qint4).dequantize())


def test_a_module_that_is_used_twice_is_replaced_once() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = quantize(model, qint8)
    assert len(report.replaced) == 1
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], QLinear)


def test_patterns_choose_and_exclusion_wins() -> None:
    model = tiny_model("llama")
    report = quantize(model, qint8, include=["*mlp*", "*q_proj"], exclude="*.1.*")
    replaced = {each.name for each in report.replaced}
    assert replaced == {
        "model.layers.0.self_attn.q_proj",
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert {each.reason for each in report.left} == {"excluded"}


def test_calls_add_up_and_leave_twins_alone() -> None:
    model = tiny_model("llama")
    quantize(model, qint4, include="*mlp*")
    first = model.model.layers[0].mlp.up_proj
    report = quantize(model, qint8)
    assert model.model.layers[0].mlp.up_proj is first
    assert first.grid == grouped(qint4, 64)
    assert model.lm_head.grid == qint8
    assert not any("mlp." in each.name for each in report.replaced)
    freeze(model)
    assert not quantize(model, qint8).replaced


def test_a_second_call_leaves_experts_alone() -> None:
    model = tiny_model("mixtral")
    quantize(model, qint8, "qint8", include="*experts*")
    before = [each for each in twins_of(model) if isinstance(each, QExpert)]
    report = quantize(model, qint4, "qint8")
    assert [each for each in twins_of(model) if isinstance(each, QExpert)] == before
    assert not any("experts" in each.name for each in (*report.replaced, *report.left))


def test_rows_that_groups_do_not_divide_are_noted() -> None:
    model = nn.Sequential(nn.Linear(96, 8), nn.Linear(50, 8))
    report = quantize(model, qint4)
    assert [each.note for each in report.replaced] == [
        "groups of 32: 64 do not divide 96 weights",
        "one scale per row: no group divides 50 weights",
    ]
    assert "groups of 32" in str(report)


def test_a_grid_that_cannot_be_had_leaves_the_layer_in_float() -> None:
    model = nn.Sequential(nn.Linear(40, 8), nn.Linear(64, 8))
    report = quantize(model, "mxfp4")
    assert [each.name for each in report.replaced] == ["1"]
    assert report.left[0].reason == "rows of 40 weights do not divide into blocks of 32"


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Looked(nn.Embedding):
    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index + 1)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Doubled(8, 8), "computes something else"),
        (Looked(8, 8), "computes something else"),
        (nn.Embedding(8, 8, max_norm=1.0), "changes while it is read"),
        (nn.Embedding(8, 8, sparse=True), "gradients"),
        (nn.Embedding(8, 8, scale_grad_by_freq=True), "gradients"),
        (nn.MultiheadAttention(8, 2).out_proj, "read from outside"),
        (nn.Bilinear(4, 4, 4), "no layer"),
        (nn.Conv1d(4, 4, 3), "no layer"),
        (nn.LayerNorm(8), "norm"),
    ],
)
def test_layers_of_other_kinds_are_left_alone_with_the_reason(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(layer)
    report = quantize(model, qint8)
    assert model[0] is layer
    assert not report.replaced
    assert reason in report.left[0].reason
    assert reason in str(report)


def test_attention_that_reads_its_weights_itself_still_works() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    quantize(model, qint8)
    freeze(model)
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 5, 16))).all()


def test_hooks_are_called_around_twins_until_their_handles_remove_them() -> None:
    model, x, called = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64), list[str]()
    quantized = copy.deepcopy(model)
    quantize(quantized, qint8)
    expected = quantized(2 * x).detach() + 1

    def before(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Tensor]) -> tuple[tuple[Tensor], dict]:
        called.append("before")
        return (2 * args[0],), kwargs

    def after(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
        called.append("after")
        return y + 1

    handles = [
        model[0].register_forward_pre_hook(before, with_kwargs=True),
        model[0].register_forward_hook(after, with_kwargs=True),
        model[0].register_forward_hook(lambda *_: called.append("always"), always_call=True),
        model[0].register_full_backward_pre_hook(lambda *_: called.append("backward before")),
        model[0].register_full_backward_hook(lambda *_: called.append("backward")),
    ]
    quantize(model, qint8)
    found = model(x.clone().requires_grad_())
    assert torch.equal(found, expected)
    found.sum().backward()
    assert called == ["before", "after", "always", "backward before", "backward"]
    with pytest.raises(RuntimeError):
        model(x[:, :3])
    assert called[-2:] == ["before", "always"]
    for handle in handles:
        handle.remove()
    freeze(model)
    close(model(2 * x) + 1, expected)
    assert called[-2:] == ["before", "always"]


def test_hooks_of_experts_are_kept() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    called = list[str]()
    model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: called.append("experts"))
    quantize(model, qint8)
    logits(model)
    assert called == ["experts"]


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.LayerNorm(64)])
def test_a_forward_that_was_put_there_by_hand_is_not_dropped(layer: nn.Module) -> None:
    model, old, x = nn.Sequential(layer), layer.forward, torch.randn(2, 64)
    layer.forward = lambda x: 3 * old(x)
    expected = model(x)
    report = quantize(model, qint8, qint8)
    assert torch.equal(model(x), expected)
    assert "own forward" in report.left[0].reason


def test_the_model_itself_cannot_be_replaced_and_is_said_to_be_left() -> None:
    model = nn.Linear(8, 8)
    report = quantize(model, qint8)
    assert not report.replaced
    assert "itself" in report.left[0].reason


def test_without_types_nothing_happens() -> None:
    model = small()
    assert not quantize(model).replaced
    assert type(model[1]) is nn.Linear


def test_activations_alone_are_refused() -> None:
    with pytest.raises(RecipeError, match="give weights="):
        quantize(tiny_model("llama"), activations=qint8)


def test_a_pattern_that_includes_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="matches no module"):
        quantize(tiny_model("llama"), qint8, include="*q_prj")


def test_the_share_counts_biases_and_norms_and_tied_matrices_once() -> None:
    model = tiny_model("gpt2")
    total = sum(each.numel() for each in model.parameters())
    matrices = sum(each.numel() for each in model.parameters() if each.dim() > 1)
    report = quantize(model, qint8)
    assert report.share == matrices / total < 1
    assert next(each for each in report.replaced if each.name == "lm_head").note.startswith("tied to")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_bad_weights_are_refused_before_anything_is_changed(name: str, bad: float) -> None:
    model = tiny_model(name)
    before = dict(model.named_modules())
    classes = {key: type(each) for key, each in before.items()}
    with torch.no_grad():
        model.lm_head.weight[3, 4] = bad
    with pytest.raises(BadWeightsError, match="lm_head"):
        quantize(model, qint8, "qint8")
    assert {key: type(each) for key, each in model.named_modules()} == classes
    assert logits(model).shape == (1, 24, 256)


def test_what_is_asked_for_must_exist() -> None:
    with pytest.raises(RecipeError, match="qint5.*qint4"):
        quantize(small(), "qint5")
    with pytest.raises(RecipeError, match="qint8 or qfloat8"):
        quantize(small(), qint8, qint4)
    with pytest.raises(RecipeError, match="nearest, search, kl, weighted, gptq, feedback, fisher, fisher-feedback"):
        quantize(small(), qint8, method="sorting")
    with pytest.raises(RecipeError, match="preset"):
        quantize(small(), qint8, preset="huge")


def test_feedback_needs_something_to_look_at() -> None:
    model = small()
    with pytest.raises(RecipeError, match="calibration"):
        quantize(model, qint8, method="feedback")
    with pytest.raises(RecipeError, match="tokenizer"):
        quantize(model, qint8, method="feedback", calibration=["a text"])
    with pytest.raises(RecipeError, match="empty"):
        quantize(model, qint8, method="feedback", calibration=[])
    with pytest.raises(RecipeError, match="empty"):
        quantize(model, qint8, method="feedback", calibration=["", ""], tokenizer=lambda text: {"input_ids": []})
    with pytest.raises(RecipeError, match="found int"):
        quantize(model, qint8, method="feedback", calibration=3)  # type: ignore[arg-type]
    assert type(model[1]) is nn.Linear
    assert set(METHODS) == {"nearest", "search", "kl", "weighted", "gptq", "feedback", "fisher", "fisher-feedback"}


def test_a_search_has_less_squared_error_in_every_layer() -> None:
    plain, searched = tiny_model("llama", num_hidden_layers=1), tiny_model("llama", num_hidden_layers=1)
    weights = {name: value.detach().clone() for name, value in plain.named_parameters()}
    quantize(plain, "qint3")
    quantize(searched, "qint3", method="search")
    with torch.no_grad():
        for (name, a), (_, b) in zip(
            ((key, each) for key, each in plain.named_modules() if isinstance(each, Twin)),
            ((key, each) for key, each in searched.named_modules() if isinstance(each, Twin)),
            strict=True,
        ):
            W = weights[f"{name}.weight"]
            assert (b.seen() - W).square().sum() < (a.seen() - W).square().sum()
            assert torch.equal(b.seen(), search(W, a.grid).dequantize())


@pytest.mark.parametrize(("weights", "most"), [("qint8", 0.27), ("qint4", 0.15), ("qint3", 0.12), ("qint2", 0.09)])
def test_memory_falls_to_what_the_codes_take(weights: str, most: float) -> None:
    config = GPT2Config(vocab_size=8192, n_embd=256, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    before = n_bytes(model)
    assert before == sum(each.nbytes for each in [*model.parameters(), *model.buffers()])
    report = quantize(model, weights)
    assert {each.twin for each in report.replaced} == {"QConv1D", "QEmbedding", "QLinear"}
    memory = freeze(model)
    assert memory.before == before
    assert memory.after == n_bytes(model) <= most * before
    assert memory.after == sum(each.nbytes for each in [*model.parameters(), *model.buffers()])
    assert f"({memory.after / before:.3f}x)" in str(memory)


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_fills_another_frozen_model(name: str) -> None:
    model, other = tiny_model(name), tiny_model(name, seed=1)
    for each in (model, other):
        quantize(each, qint8, "qint8")
        freeze(each)
    for assign in (False, True):
        target = copy.deepcopy(other)
        target.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(logits(target), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_fills_another_model_that_is_not_frozen(name: str) -> None:
    original, model, other = tiny_model(name), tiny_model(name), tiny_model(name, seed=1)
    for each in (model, other):
        quantize(each, qint8)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    if name != "mixtral":  # its stacks have become one parameter per expert
        assert model.state_dict().keys() == original.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2", "gemma3_text"])
def test_casting_never_touches_codes_or_scales(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name)
    quantize(model, qint4, "qint8", exclude="*norm*")
    freeze(model)
    before, stored = logits(model), [each.frozen.quantized for each in twins_of(model)]
    model.to(dtype)
    after = logits(model)
    assert after.dtype == dtype
    for twin, expected in zip(twins_of(model), stored, strict=True):
        found = twin.frozen.quantized
        assert torch.equal(found.codes, expected.codes)
        for key, value in expected.params.items():
            assert found.params[key].dtype == value.dtype
            assert torch.equal(found.params[key], value)
    tolerance = {torch.float64: 0.06, torch.float16: 0.08, torch.bfloat16: 0.3}[dtype]  # codes of inputs flip
    close(after.float(), before, tolerance)


@pytest.mark.parametrize("weights", ["qint8", "qint4", "nf4", "kmeans3"])
def test_generation_is_the_same_frozen_or_not(weights: str) -> None:
    model = tiny_model("llama")
    quantize(model, weights)

    def tokens() -> Tensor:
        return model.generate(TOKENS[:, :6], max_new_tokens=24, do_sample=False)

    before = tokens()
    freeze(model)
    assert torch.equal(tokens(), before)
    assert before.shape[1] > 10


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("weights", "activations"), [("qint8", "qint8"), ("qint4", None), ("kmeans4", None), ("kmeans3+2%", None)]
)
def test_a_frozen_block_compiles_whole(weights: str, activations: str | None, backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64)).eval()
    quantize(model, weights, activations)
    freeze(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(3, 64)
    with torch.no_grad():
        close(compiled(x), model(x), 1e-6)


@pytest.mark.parametrize("activations", [None, "qint8"])
def test_a_frozen_model_compiles_whole(activations: str | None) -> None:
    model = tiny_model("llama")
    quantize(model, qint8, activations)
    freeze(model)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(TOKENS), logits(model), 1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_inference_mode(frozen: bool) -> None:
    model = tiny_model("llama")
    quantize(model, qint8, "qint8")
    if frozen:
        freeze(model)
    with torch.inference_mode():
        found = model(TOKENS).logits
    assert torch.equal(found, logits(model))
    leaf = torch.zeros(1, requires_grad=True)
    model(inputs_embeds=model.get_input_embeddings()(TOKENS) + leaf).logits.sum().backward()
    assert leaf.grad is not None


def test_training_goes_on_after_evaluation() -> None:
    model = small()
    quantize(model, qint4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    index, wanted = torch.arange(50), torch.arange(50).flip(0)
    losses = []
    for _ in range(25):
        with torch.inference_mode():
            losses.append(nn.functional.cross_entropy(model(index), wanted).item())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(index), wanted).backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_training_modes_and_devices_are_kept() -> None:
    model = small()
    model[1].eval()
    quantize(model, qint8)
    assert (model[1].training, model[4].training) == (False, True)
    assert isinstance(model[1], QLinear)


def test_any_grid_by_name_can_be_asked_for() -> None:
    model = nn.Sequential(nn.Linear(256, 16))
    W = model[0].weight.detach().clone()
    report = quantize(model, "q4_k")
    assert report.replaced[0].weights == "q4_k"
    freeze(model)
    assert torch.equal(model[0].weight, nearest(W, grid_named("q4_k")).dequantize())


def test_freezing_twice_changes_nothing() -> None:
    model = small()
    quantize(model, qint8)
    freeze(model)
    stored = [each.frozen for each in twins_of(model)]
    memory = freeze(model)
    assert [each.frozen for each in twins_of(model)] == stored
    assert memory.before == memory.after


def test_conv1d_of_transformers_is_known_by_what_it_is() -> None:
    model = tiny_model("gpt2")
    quantize(model, qint8)
    assert isinstance(model.transformer.h[0].attn.c_attn, QConv1D)
    assert isinstance(model.transformer.h[0].mlp.c_fc, QConv1D)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2", "mixtral"])
def test_models_can_be_pickled(name: str, frozen: bool) -> None:
    model = tiny_model(name)
    quantize(model, "qint4", "qint8")
    if frozen:
        freeze(model)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(other), logits(model))
    assert repr(other) == repr(model)


def test_frozen_models_are_exported() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    quantize(model, qint8, "qint8")
    freeze(model)
    x = torch.randn(3, 64)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        close(exported(x), model(x), 1e-6)


@pytest.mark.parametrize("activations", [None, "qint8"])
def test_inputs_of_any_shape(activations: str | None) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    quantize(model, "qint4", activations)
    x = torch.randn(64, 6).T
    with torch.no_grad():
        before = model(x)
        freeze(model)
        close(model(x), before, 1e-4)
        close(model(x.view(2, 3, 64)).flatten(0, 1), before, 1e-4)
        close(model(x[1]), before[1], 1e-4)
        assert model(x[:0]).shape == (0, 32)


@pytest.mark.parametrize(("scale", "reason"), [(1e8, "does not fit float"), (1e-9, "all zeros")])
@pytest.mark.parametrize("weights", ["qint4", "nf4", "kmeans4", "q4_0", "nvfp4"])
def test_weights_that_a_grid_cannot_hold_stay_in_float(weights: str, scale: float, reason: str) -> None:
    model, x = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 64)), torch.randn(2, 64)
    with torch.no_grad():
        model[0].weight.mul_(scale)
    before = model[0](x)
    report = quantize(model, weights)
    assert [each.name for each in report.replaced] == ["1", "2"]
    assert reason in report.left[0].reason
    assert torch.equal(model[0](x), before)
    freeze(model)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("bad", [1e8, float("nan")])
def test_a_matrix_that_cannot_be_frozen_leaves_the_whole_model_as_it_is(bad: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize(model, qint4)
    with torch.no_grad():
        model[1].weight.mul_(bad)
    with pytest.raises(BadWeightsError, match="^1: "):
        freeze(model)
    assert all(each.frozen is None for each in twins_of(model))


@pytest.mark.parametrize("name", TYPES)
def test_layers_of_nothing_stay_nothing(name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    nn.init.zeros_(model[0].weight)
    quantize(model, name, "qint8")
    freeze(model)
    assert (model(torch.randn(2, 64)) == 0).all()
    assert (model(torch.zeros(2, 64)) == 0).all()


def test_a_model_without_layers_is_no_error() -> None:
    model = nn.Sequential(nn.ReLU())
    assert "0.0%" in str(quantize(model, qint8))
    assert "0.0 MB" in str(freeze(model))


def test_models_can_be_made_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32))
        quantize(model, qint8, "qint8")
    model.to_empty(device="cpu")
    assert not any(each.is_meta for each in [*model.parameters(), *model.buffers()])
    assert not model[0].inputs.static


@pytest.mark.parametrize("activations", [None, "qint8", "qfloat8"])
@pytest.mark.parametrize("weights", TYPES)
def test_without_native_code_everything_is_the_same(
    weights: str, activations: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    quantize(model, weights, activations)
    freeze(model)
    index = torch.arange(50)
    with torch.no_grad():
        before = model(index)
        monkeypatch.setattr("whit.kernels.library.NATIVE", None)
        close(model(index), before, 0.03 if activations else 1e-5)  # codes of inputs flip on the last bit


@pytest.mark.parametrize("weights", ["uniform4", "kmeans3", "kl4", "K_M-4bit-g32", "K_L-3bit", "kmeans2-tensor"])
def test_quantizers_by_name_on_any_layer(weights: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), Conv1D(32, 96))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids)
        report = quantize(model, weights)
        seen = model(ids)
        freeze(model)
        after = model(ids)
    assert len(report.replaced) == 3
    assert torch.allclose(seen, after, atol=1e-5 * float(before.abs().max()))
    assert (after - before).norm() < (0.9 if "2" in weights else 0.4) * before.norm()


def test_kl_cuts_ranges_and_lets_nobody_else_choose_them() -> None:
    W = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) ** 3
    found = []
    for weights in ("uniform3", "kl3"):
        model = nn.Sequential(nn.Linear(512, 8))
        with torch.no_grad():
            model[0].weight.copy_(W)
        quantize(model, weights)
        found.append(model[0].quantized().params["scale"].float())
    assert (found[1] <= found[0]).all()
    assert (found[1] < found[0]).any()
    with pytest.raises(RecipeError, match="chooses its ranges by kl"):
        quantize(nn.Sequential(nn.Linear(8, 8)), "kl4", method="search")
    with pytest.raises(RecipeError, match="ranges of scales"):
        quantize(nn.Sequential(nn.Linear(8, 8)), "kmeans4", method="kl")
