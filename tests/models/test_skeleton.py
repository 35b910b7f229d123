"""The truth here is transformers itself: the model that was saved, and its own logits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import huggingface_hub.utils as hub_utils
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny import TINY, VOCAB, random_tokens, save_tiny
from whit.checkpoints.source import TensorInfo, TensorSource
from whit.errors import BadWeightsError, BrokenFileError, ModelError, UnknownArchitectureError
from whit.models.model import Model
from whit.models.open import open_model
from whit.models.skeleton import load_module, split

# Models whose head does more than multiply: Cohere scales logits, this OPT projects before the head.
ODD_HEADS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "cohere": lambda: transformers.CohereConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        logit_scale=0.1,
    ),
    "opt-projected": lambda: transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=16
    ),
}
IDS = torch.tensor(random_tokens(24)).view(2, 12)  # [batch, tokens]


class Changed:
    """A source with some tensors replaced, added or (None) removed."""

    def __init__(self, source: TensorSource, changes: Mapping[str, Tensor | None]) -> None:
        self._source, self._changes = source, changes

    def names(self) -> Sequence[str]:
        names = dict.fromkeys([*self._source.names(), *self._changes])
        return [name for name in names if self._changes.get(name, True) is not None]

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str) -> Tensor:
        changed = self._changes.get(name)
        return self._source.read(name) if changed is None else changed


def saved(name: str, folder: Path) -> tuple[Model, torch.nn.Module]:
    """A random model as a folder that Whit opened, and as transformers has it in memory."""
    if name in TINY:
        module = save_tiny(name, folder)
    else:
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(ODD_HEADS[name](), attn_implementation="eager").float().eval()
        module.save_pretrained(folder)
    return open_model(folder), module


@pytest.fixture
def llama(tmp_path: Path) -> Model:
    return saved("llama", tmp_path)[0]


@pytest.mark.parametrize("name", [*TINY, *ODD_HEADS])
def test_a_loaded_model_and_its_two_halves_give_the_logits_of_the_model_that_was_saved(
    name: str, tmp_path: Path
) -> None:
    model, module = saved(name, tmp_path)
    loaded = load_module(model)
    with torch.inference_mode():
        expected = module(IDS).logits  # [batch, tokens, vocab]
        assert torch.equal(loaded(IDS).logits, expected)
    halves = split(loaded)
    hidden = halves.body(IDS)
    logits = torch.cat([halves.head(hidden[1, :5]), halves.head(hidden[1, 5:])])  # in two pieces
    torch.testing.assert_close(logits, expected[1], rtol=1e-5, atol=1e-5)
    assert halves.n_vocab == VOCAB


def test_dropping_the_body_frees_its_weights_and_keeps_the_head(llama: Model) -> None:
    module = load_module(llama)
    halves = split(module)
    assert [name for name, _ in module.named_parameters()] == ["lm_head.weight"]
    assert halves.head(torch.zeros(3, 64)).shape == (3, VOCAB)


def test_half_precision_weights_are_loaded_as_float32(llama: Model) -> None:
    names = llama.tensors.names()
    halved = replace(llama, tensors=Changed(llama.tensors, {name: llama.tensors.read(name).half() for name in names}))
    module = load_module(halved)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_parameters_are_the_very_tensors_that_were_read(llama: Model) -> None:
    handed_out = {name: llama.tensors.read(name) for name in llama.tensors.names()}
    module = load_module(replace(llama, tensors=Changed(llama.tensors, handed_out)))
    addresses = {tensor.data_ptr() for tensor in handed_out.values()}
    assert {parameter.data_ptr() for parameter in module.parameters()} == addresses  # so there is no second copy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(llama: Model, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = llama.tensors.read(name)
    broken[3, 4] = value
    with pytest.raises(BadWeightsError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN or infinite"):
        load_module(replace(llama, tensors=Changed(llama.tensors, {name: broken})))


def test_missing_weights_are_named(llama: Model) -> None:
    absent = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(BrokenFileError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_module(replace(llama, tensors=Changed(llama.tensors, {absent: None})))


def test_weights_of_another_architecture_are_named(llama: Model) -> None:
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    with pytest.raises(BrokenFileError, match=r"does not have: model\.layers\.0\.self_attn\.q_norm\.weight"):
        load_module(replace(llama, tensors=Changed(llama.tensors, extra)))


def test_buffers_that_old_checkpoints_carry_are_not_weights(llama: Model) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    load_module(replace(llama, tensors=Changed(llama.tensors, extra)))


def test_a_wrong_shape_is_named_with_both_shapes(llama: Model) -> None:
    changes = {"model.norm.weight": torch.ones(63)}
    with pytest.raises(BadWeightsError, match=r"model\.norm\.weight has shape \[63\].* asks for \[64\]"):
        load_module(replace(llama, tensors=Changed(llama.tensors, changes)))


def test_an_error_of_the_reader_comes_through_unchanged(llama: Model) -> None:
    class Truncated(Changed):
        def read(self, name: str) -> Tensor:
            raise BrokenFileError(f"{name}: the file ends early")

    with pytest.raises(BrokenFileError, match="the file ends early"):
        load_module(replace(llama, tensors=Truncated(llama.tensors, {})))


def test_an_architecture_that_transformers_does_not_know_is_refused(llama: Model) -> None:
    with pytest.raises(UnknownArchitectureError, match="'martian'"):
        load_module(replace(llama, config={"model_type": "martian"}))


def test_a_model_that_predicts_no_next_token_is_refused(llama: Model) -> None:
    with pytest.raises(UnknownArchitectureError, match="not a causal language model"):
        load_module(replace(llama, config={"model_type": "vit"}))


def test_an_impossible_configuration_is_refused(llama: Model) -> None:
    with pytest.raises(ModelError, match="rejects the configuration"):
        load_module(replace(llama, config={**llama.config, "hidden_size": "many"}))


def test_code_and_kernels_named_in_a_configuration_are_ignored(llama: Model) -> None:
    named = {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "attn_implementation": "evil/kernel"}
    module = load_module(replace(llama, config={**llama.config, **named, "_attn_implementation": "evil/kernel"}))
    assert type(module) is transformers.LlamaForCausalLM
    assert module.config._attn_implementation == "eager"


def test_loading_prints_nothing_and_leaves_no_switch_changed(llama: Model, capfd: pytest.CaptureFixture[str]) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub_utils.are_progress_bars_disabled()
    before_torch = torch.get_default_dtype()
    load_module(llama)
    after = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub_utils.are_progress_bars_disabled()
    assert after == before
    assert torch.get_default_dtype() == before_torch
    assert capfd.readouterr() == ("", "")
