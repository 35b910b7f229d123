from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tiny import random_tokens, tiny_model
from whit.errors import ModelError, RecipeError
from whit.live.inputs import Inputs
from whit.live.quantize import freeze, quantize, twins_of
from whit.live.run import Call, calls_of, divergence, hooked, log_probabilities, recorded, unrounded

TOKENS = torch.tensor([random_tokens(20)])


def test_batches_of_every_kind_become_calls() -> None:
    ids = torch.arange(12).view(3, 4)
    assert [call.args[0].tolist() for call in calls_of(ids)] == [[row] for row in ids.tolist()]
    (one,) = calls_of({"input_ids": ids})
    assert one.args == ()
    assert one.kwargs["input_ids"] is ids
    several = calls_of([ids, {"input_ids": ids}])
    assert several[0].args[0] is ids
    assert several[1].kwargs["input_ids"] is ids


ROWS = [[5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize(
    ("batches", "found"),
    [
        (ROWS, [[ROWS[0]], [ROWS[1]]]),
        ([5, 6, 7], [[[5, 6, 7]]]),
        ([[5, 6], [], [7]], [[[5, 6]], [[7]]]),
        (np.array(ROWS), [[ROWS[0]], [ROWS[1]]]),
        ([np.array(ROWS)], [ROWS]),
        ([torch.tensor(ROWS[0]), torch.tensor(ROWS)], [[ROWS[0]], ROWS]),
        ((each for each in ROWS), [[ROWS[0]], [ROWS[1]]]),
        (DataLoader(TensorDataset(torch.tensor(ROWS)), batch_size=2), [ROWS]),
        (DataLoader(ROWS, batch_size=2, collate_fn=torch.tensor), [ROWS]),
        (DataLoader(["ab", "", "c"], batch_size=2), [[[97, 98]], [[99]]]),
        ("ab", [[[97, 98]]]),
        (["", "\n"], [[[10]]]),
        (torch.empty(0, 3, dtype=torch.long), []),
    ],
)
def test_text_in_any_iterable_becomes_calls(batches: Any, found: list[list[list[int]]]) -> None:
    calls = calls_of(batches, lambda text: {"input_ids": [ord(letter) for letter in text]})
    assert [call.args[0].tolist() for call in calls] == found
    assert all(call.args[0].dtype == torch.long for call in calls)


def test_what_is_no_text_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="found float"):
        calls_of([1.5])
    with pytest.raises(RecipeError, match="found NoneType"):
        calls_of([None])
    with pytest.raises(RecipeError, match="tuple of 2, with tensors"):
        calls_of([(TOKENS, TOKENS)])
    with pytest.raises(RecipeError, match="a tokenizer"):
        calls_of(iter(["a text"]))


def test_calls_are_recorded_and_give_the_same_again() -> None:
    model = tiny_model("llama")
    mask = torch.ones_like(TOKENS)
    with torch.no_grad(), recorded(model) as calls:
        first = model(TOKENS).logits
        model(input_ids=TOKENS[:, :7], attention_mask=mask[:, :7])
    assert len(calls) == 2
    with torch.no_grad():
        again = calls[0](model)
    assert torch.equal(again.logits, first)
    assert again.past_key_values is None
    model(TOKENS)
    assert len(calls) == 2


def test_of_generating_only_the_prompt_is_recorded() -> None:
    model = tiny_model("llama")
    with recorded(model) as calls:
        model.generate(TOKENS, max_new_tokens=5, do_sample=False)
    assert len(calls) == 1
    with torch.no_grad():
        found = calls[0](model).logits
        assert torch.allclose(found[:, -1], model(TOKENS).logits[:, -1], rtol=1e-5, atol=1e-5)


def test_divergence_is_that_of_a_plain_sum() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    calls = calls_of([TOKENS, TOKENS[:, :5]])
    reference = log_probabilities(model, calls)
    assert [tuple(each.shape) for each in reference] == [(20, 256), (5, 256)]
    total, n = 0.0, 0
    with torch.no_grad():
        for ids in (TOKENS, TOKENS[:, :5]):
            p, q = (each(ids).logits[0].double().softmax(-1) for each in (model, other))
            total += (p * (p / q).log()).sum().item()
            n += ids.shape[1]
    assert divergence(other, calls, reference) == pytest.approx(total / n, rel=1e-4)
    assert divergence(model, calls, reference) == 0.0


def test_models_may_return_a_tensor_but_not_nothing() -> None:
    plain = nn.Sequential(nn.Linear(4, 3))
    (found,) = log_probabilities(plain, calls_of([torch.ones(2, 4)]))
    assert found.exp().sum(-1).tolist() == pytest.approx([1, 1])

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    with pytest.raises(ModelError, match="Silent"):
        log_probabilities(Silent(), calls_of([torch.ones(2, 4)]))


def test_without_rounding_a_model_is_the_original_and_then_rounds_again() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        exact = model(TOKENS).logits
        quantize(model, "qint3", "qint8")
        rounded = model(TOKENS).logits
        with unrounded(model):
            assert torch.equal(model(TOKENS).logits, exact)
        assert torch.equal(model(TOKENS).logits, rounded)


def test_rounding_comes_back_after_an_error_and_what_was_off_stays_off() -> None:
    model = tiny_model("llama")
    quantize(model, "qint3", "qint8")
    first = next(twins_of(model))
    first.active = False
    with pytest.raises(KeyboardInterrupt), unrounded(model):
        raise KeyboardInterrupt
    assert not first.active
    assert all(each.active for each in twins_of(model) if each is not first)
    assert all(each.enabled for each in model.modules() if isinstance(each, Inputs))


def test_hooks_tell_what_arrives_and_leaves_and_are_gone_afterwards() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    seen: list[tuple[str, Tensor]] = []
    x = torch.ones(1, 4)
    with (
        hooked({"a": model[0]}, lambda *it: seen.append(it)),
        hooked({"b": model[1]}, lambda *it: seen.append(it), outputs=True),
    ):
        y = model(x)
    model(x)
    assert [key for key, _ in seen] == ["a", "b"]
    assert seen[0][1] is x
    assert seen[1][1] is y


def test_what_arrives_by_name_is_seen_too() -> None:
    layer, x, seen = nn.Linear(4, 4), torch.randn(2, 4), []
    with hooked({"a": layer}, lambda *it: seen.append(it)):
        layer(input=x)
    assert seen[0][1] is x


def test_a_frozen_model_can_be_called_with_keywords_alone() -> None:
    model = tiny_model("llama")
    quantize(model, "qint8")
    freeze(model)
    assert Call((), {"input_ids": TOKENS})(model).logits.shape == (1, 20, 256)
