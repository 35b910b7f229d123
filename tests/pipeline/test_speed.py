"""Every kind of work has a law here; what is timed is what jobs call. No time is asserted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.hub import HubHeaders
from whit.models.model import Model
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.counts import Text, job_work
from whit.pipeline.duration import NOTHING, STEP
from whit.pipeline.effort import Preset
from whit.pipeline.folder import plan_model
from whit.pipeline.quantize import model_view
from whit.pipeline.speed import Machine, shallow
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.rounding.methods import Effort

LENGTH = 32
FAST = Preset(3, "docs", 0.0, Effort(sweeps=1))


@pytest.fixture
def llama(tmp_path: Path) -> Model:
    save_tiny("llama", tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    return open_model(tmp_path / "model")


def test_the_survey_finds_who_shares_an_input(llama: Model) -> None:
    survey = Machine(llama, model_view(llama), LENGTH, NOTHING).survey
    groups = {frozenset(name.removesuffix(".weight") for name in group) for group in survey.shared}
    assert groups == {
        frozenset({"attn_q", "attn_k", "attn_v"}),
        frozenset({"attn_output"}),
        frozenset({"ffn_gate", "ffn_up"}),
        frozenset({"ffn_down"}),
    }
    assert survey.kv_heads == (2, 2)


def test_every_kind_of_work_has_a_law(llama: Model, tmp_path: Path) -> None:
    recipe = folder_recipe("gptq-4bit-g32", "feedback")
    assert recipe is not None
    plan, n_bytes = plan_model(llama, recipe)
    machine = Machine(llama, model_view(llama), LENGTH, NOTHING)
    work = job_work(plan, n_bytes, Text(3, LENGTH, (2,)), FAST, machine.survey, looked=1)
    laws = machine.laws(work, FAST.effort, tmp_path)
    assert set(work.kinds()) <= set(laws)
    costs = [law(rows, cols) for law in laws.values() for rows in (1, 500) for cols in (32, 4096)]
    assert all(math.isfinite(each.wall) and each.wall >= 0 and each.cpu >= 0 for each in costs)
    assert laws[STEP](4, 8).cpu == pytest.approx(2 * laws[STEP](2, 8).cpu)
    assert sum(each.wall for each in work.cost(laws, 2).values()) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # nothing is left behind


def test_of_a_hub_model_headers_are_enough(llama: Model, tmp_path: Path) -> None:
    infos = [llama.tensors.info(name) for name in llama.tensors.names()]
    remote = replace(llama, tensors=HubHeaders(infos))
    plan, n_bytes = plan_model(remote, recipe_named("q4_0", "nearest"))
    machine = Machine(remote, model_view(remote), LENGTH, NOTHING)
    work = job_work(plan, n_bytes, Text(3, LENGTH), FAST, machine.survey, looked=0)
    assert set(work.kinds()) <= set(machine.laws(work, FAST.effort, tmp_path))


def test_a_shallow_model_is_the_first_blocks_of_a_deep_one(tmp_path: Path) -> None:
    save_tiny("gemma3_text", tmp_path)  # has a list with an entry per block
    model = open_model(tmp_path)
    module = load_module(shallow(model, 2))
    whole = load_module(model)
    assert len(module.get_submodule("model.layers")) == 2 < len(whole.get_submodule("model.layers"))
    for name, value in module.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])
