"""Code that was written for optimum-quanto, with another import."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM

from tiny import random_tokens, tiny_model
from whit.errors import ModelError
from whit.live.calibrate import calibrate
from whit.live.inputs import Inputs
from whit.live.quantize import twins_of
from whit.quanto import (
    Calibration,
    QuantizedModelForCausalLM,
    freeze,
    qint4,
    qint8,
    quantization_map,
    quantize,
    requantize,
)

IDS = torch.tensor([random_tokens(20)])


def logits(model: nn.Module | QuantizedModelForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_the_usual_lines_quantize_calibrate_and_freeze() -> None:
    model = tiny_model("llama")
    expected = logits(model)
    quantize(model, qint8, qint8, None, None, "lm_head")
    with Calibration(momentum=0.9):
        logits(model)
    freeze(model)
    inputs = {name: each for name, each in model.named_modules() if isinstance(each, Inputs)}
    assert all(each.enabled and each.observer is None for each in inputs.values())
    assert [name for name, each in inputs.items() if not each.static] == ["model.norm.outputs"]  # the head is in float
    assert type(model.lm_head) is nn.Linear
    assert (logits(model) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_a_calibration_finds_the_scales_that_calibrate_finds(name: str, frozen: bool) -> None:
    first, second = tiny_model(name), tiny_model(name)
    for model in (first, second):
        quantize(model, qint8, qint8)
        if frozen:
            freeze(model)
    with torch.no_grad(), Calibration():
        first.model.embed_tokens(IDS)  # a part of it before the whole
        first(IDS)
    with torch.no_grad(), calibrate(second):
        second(IDS)
    found, wanted = ([each for each in model.modules() if isinstance(each, Inputs)] for model in (first, second))
    assert [each.static for each in found] == [each.static for each in wanted]
    assert [each.most for each in found] == [each.most for each in wanted]
    assert all(each.enabled and each.observer is None for each in found)
    assert sum(each.static for each in found) > len(found) / 2


def test_a_calibration_touches_only_what_runs_in_it() -> None:
    first, second = tiny_model("llama"), tiny_model("llama", seed=1)
    for model in (first, second):
        quantize(model, qint8, qint8)
    with Calibration():
        logits(first)
    logits(second)
    assert all(each.static for each in first.modules() if isinstance(each, Inputs))
    assert not any(each.static for each in second.modules() if isinstance(each, Inputs))


def test_an_error_inside_leaves_scales_per_token() -> None:
    model = tiny_model("llama")
    quantize(model, qint8, qint8)

    def broken() -> None:
        with Calibration():
            logits(model)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert not any(each.static or each.observer for each in model.modules() if isinstance(each, Inputs))


def test_requantize_needs_a_state_dict_and_a_map() -> None:
    model = tiny_model("mixtral")
    quantize(model, weights=qint4, activations=qint8)
    with Calibration():
        logits(model)
    freeze(model)
    other = tiny_model("mixtral", seed=5)
    requantize(other, model.state_dict(), quantization_map(model))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_requantize_fills_a_model_without_memory(name: str, device: torch.device | None) -> None:
    model = tiny_model(name)
    quantize(model, weights=qint8)
    freeze(model)
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    requantize(other.eval(), model.state_dict(), quantization_map(model), device)
    assert torch.equal(logits(other), logits(model))


def test_requantize_names_a_buffer_that_nobody_can_make() -> None:
    model, other = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))
    quantize(model, qint8)
    freeze(model)
    other.register_buffer("shift", torch.zeros(64, device="meta"), persistent=False)
    with pytest.raises(ModelError, match="shift"):
        requantize(other, model.state_dict(), quantization_map(model))


def test_requantize_takes_what_safetensors_writes_of_tied_layers(tmp_path: Path) -> None:
    model, other = tiny_model("qwen2-tied"), tiny_model("qwen2-tied", seed=5)
    quantize(model, weights=qint4)
    freeze(model)
    save_model(model, str(tmp_path / "model.safetensors"))
    requantize(other, load_file(tmp_path / "model.safetensors"), quantization_map(model))
    assert torch.equal(logits(other), logits(model))


def test_the_model_class_saves_and_loads(tmp_path: Path) -> None:
    wrapped = QuantizedModelForCausalLM.quantize(tiny_model("gpt2"), weights="qint4", exclude="lm_head")
    wrapped.save_pretrained(tmp_path / "out")
    again = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(wrapped), rtol=1e-4, atol=1e-4)  # attention may be another
    assert again.config.model_type == "gpt2"
    assert len(list(twins_of(again._wrapped))) == len(list(twins_of(wrapped._wrapped)))


@pytest.mark.parametrize("first", ["tokenizer", "model"])
def test_a_tokenizer_is_saved_before_a_model_or_between_two(first: str, tmp_path: Path) -> None:
    wrapped = QuantizedModelForCausalLM.quantize(tiny_model("llama"), weights=qint8)
    if first == "model":
        wrapped.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(name)
    wrapped.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == name
    again = QuantizedModelForCausalLM.from_pretrained(tmp_path)
    again._wrapped.set_attn_implementation("eager")
    assert torch.equal(logits(again), logits(wrapped))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda it: pickle.loads(pickle.dumps(it))])
def test_the_model_class_can_be_copied_and_pickled(copied: Callable[[Any], Any]) -> None:
    wrapped = QuantizedModelForCausalLM.quantize(tiny_model("llama"), weights=qint8, activations=qint8)
    again = copied(wrapped)
    assert type(again) is QuantizedModelForCausalLM
    assert torch.equal(logits(again), logits(wrapped))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = again.no_such_name


def test_what_has_no_counterpart_is_refused() -> None:
    with pytest.raises(TypeError, match="search"):
        quantize(tiny_model("llama"), qint8, None, object())
    with pytest.raises(ValueError, match="must be quantized"):
        QuantizedModelForCausalLM(tiny_model("llama"))
