from pathlib import Path

import torch

from tiny import random_tokens, save_tiny, tiny_model
from whit.evaluation.continuations import compared, greedy
from whit.models.open import open_model
from whit.models.skeleton import load_module


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    prompts = torch.tensor([random_tokens(8, seed) for seed in range(3)])
    expected = tiny_model("llama").generate(
        prompts, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(greedy(load_module(open_model(tmp_path)), prompts, 6), expected[:, 8:])


def test_what_comes_after_a_difference_does_not_count() -> None:
    found = compared(torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4]]), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]))
    assert (found.prompts, found.tokens, found.identical) == (2, 4, 1)
    assert found.same == 5 / 8
