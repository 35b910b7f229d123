"""Frozen models attend with the kernel for one token where it serves, and with torch's function where it does not."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

import whit
from whit.kernels import attention as kernel
from whit.live import attention
from whit.live.quantize import freeze, quantize

IDS = torch.arange(20).view(2, 10)


def model(dtype: torch.dtype = torch.bfloat16, implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=50, eos_token_id=None, bos_token_id=None, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def frozen(made: Any) -> Any:
    quantize(made, "q4_0")
    freeze(made)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of keys that the kernel was given."""
    if kernel.LIBRARY is None:
        pytest.skip("the package was built without a compiler")
    seen: list[tuple[int, ...]] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor | None:
        seen.append(tuple(k.shape))
        return kernel.attend(q, k, v, *others)

    monkeypatch.setattr(attention, "attend", noted)
    return seen


def step(made: Any, past: Any, mask: Tensor | None = None) -> Tensor:
    last = torch.tensor([[3], [4]])
    return made(input_ids=last, past_key_values=copy.deepcopy(past), attention_mask=mask).logits


def prompt(made: Any, mask: Tensor | None = None) -> Any:
    return made(input_ids=IDS, attention_mask=mask, use_cache=True).past_key_values


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_one_token_as_with_torchs_function(calls: list[Any], padded: bool, dtype: torch.dtype) -> None:
    made = frozen(model(dtype))
    assert made.config._attn_implementation == attention.NAME
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    given = (mask[:, :10], mask) if padded else (None, None)
    past = prompt(made, given[0])
    assert not calls  # ten queries are torch's
    found = step(made, past, given[1])
    assert calls == [(2, 2, 11, 16)] * 2
    made.set_attn_implementation("sdpa")
    wanted = step(made, past, given[1])
    assert len(calls) == 2
    assert (found - wanted).abs().max() <= 2**-6 * wanted.abs().max()
    assert not torch.equal(found, torch.zeros_like(found))


@torch.no_grad()
def test_what_is_left_to_torch(calls: list[Any]) -> None:
    made = frozen(model(torch.float32))  # as fast there
    step(made, prompt(made))
    made = frozen(model())
    past = prompt(made)
    with torch.enable_grad():
        step(made, past)
    made.train()
    for each in made.modules():
        if hasattr(each, "attention_dropout"):
            each.attention_dropout = 0.5
    step(made, past)
    assert not calls


@torch.no_grad()
def test_compiled_models_are_torchs(calls: list[Any]) -> None:
    made = frozen(model())
    past = prompt(made)
    compiled = torch.compile(made, backend="eager")
    wanted = step(made, past)
    calls.clear()
    assert (step(compiled, past) - wanted).abs().max() <= 2**-6 * wanted.abs().max()
    assert not calls


def test_models_that_attend_otherwise_stay_as_they_are() -> None:
    assert frozen(model(implementation="eager")).config._attn_implementation == "eager"
    config = FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    falcon = FalconForCausalLM(config)
    before = falcon.config._attn_implementation
    assert frozen(falcon).config._attn_implementation == before  # it looks for "sdpa" itself
    plain = frozen(nn.Sequential(nn.Linear(64, 64)))
    assert not hasattr(plain, "_whit_attention")


def test_loaded_and_copied_models_have_it_and_files_say_nothing_of_it(tmp_path: Path) -> None:
    made = frozen(model())
    whit.save(made, tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.json"):
        assert f'"{attention.NAME}"' not in json.dumps(json.loads(file.read_text()).get("attn_implementation", ""))
    assert whit.load(tmp_path / "saved").config._attn_implementation == attention.NAME
    assert "attn" not in made.config.to_json_string()
    assert copy.deepcopy(made).config._attn_implementation == attention.NAME


@torch.no_grad()
def test_a_pickled_model_works_where_nothing_is_frozen_before(tmp_path: Path) -> None:
    made = frozen(model())
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(made))
    script = (
        "import pickle, sys, torch\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(model.generate(torch.arange(10)[None], max_new_tokens=5, do_sample=False).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.pickle"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = made.generate(torch.arange(10)[None], max_new_tokens=5, do_sample=False)
    assert json.loads(done.stdout.splitlines()[-1]) == wanted.tolist()
