"""Frozen models attend with the kernel for one token where it serves, and with torch's function where it does not."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
    assert made.config._attn_implementation == "sdpa"  # by which models decide what they hand over
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    given = (mask[:, :10], mask) if padded else (None, None)
    past = prompt(made, given[0])
    assert not calls  # ten queries are torch's
    found = step(made, past, given[1])
    assert calls == [(2, 2, 11, 16)] * 2
    for each in made.modules():
        each.__dict__.pop(attention.MARK, None)
    wanted = step(made, past, given[1])
    assert len(calls) == 2
    assert (found - wanted).abs().max() <= 2**-6 * wanted.abs().max()
    assert not torch.equal(found, torch.zeros_like(found))


@torch.no_grad()
def test_what_is_left_to_torch(calls: list[Any]) -> None:
    made = frozen(model(torch.float32))  # as fast there
    step(made, prompt(made))
    other = model()  # never frozen, though another was
    step(other, prompt(other))
    made = frozen(model())
    past = prompt(made)
    with torch.enable_grad():
        step(made, past)
    with torch.autocast("cpu", torch.bfloat16):
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


@torch.no_grad()
def test_models_that_attend_otherwise_do_not_meet_it(calls: list[Any]) -> None:
    made = frozen(model(implementation="eager"))
    step(made, prompt(made))
    assert frozen(nn.Sequential(nn.Linear(64, 64)))[0](torch.zeros(1, 64)).shape == (1, 64)
    assert not calls


@torch.no_grad()
def test_loaded_and_copied_models_have_it(calls: list[Any], tmp_path: Path) -> None:
    made = frozen(model())
    whit.save(made, tmp_path / "saved")
    for each in (whit.load(tmp_path / "saved"), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        calls.clear()
        step(each, prompt(each))
        assert len(calls) == 2


def test_it_is_registered_once() -> None:
    frozen(model())
    first = ALL_ATTENTION_FUNCTIONS["sdpa"]
    frozen(model())
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is first
