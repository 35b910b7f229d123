"""Text that a model writes, against the model's own distribution."""

from pathlib import Path

import pytest
import torch

from tiny import TINY, VOCAB, save_tiny
from whit.models import sampling
from whit.models.open import open_model
from whit.models.sampling import PROMPT, continued_windows, sampled_windows
from whit.models.skeleton import load_module

LENGTH, N = 24, 6


@pytest.mark.parametrize("name", TINY)
def test_tokens_are_drawn_from_the_distribution_of_the_model(name: str, tmp_path: Path) -> None:
    """The mean log-likelihood of what is drawn is minus the entropy, which no broken cache would give."""
    save_tiny(name, tmp_path)
    model = open_model(tmp_path)
    ids = sampled_windows(model, N, LENGTH)
    assert ids.shape == (N, LENGTH)
    assert ids.dtype == torch.int64
    assert ids.min().item() >= 0
    assert ids.max().item() < VOCAB
    with torch.inference_mode():
        logs = load_module(model, torch.bfloat16)(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    drawn = logs[:, :-1].gather(-1, ids[:, 1:, None]).flatten()
    entropy = -(logs.exp() * logs).sum(-1)[:, :-1].flatten()
    surprise = drawn + entropy  # of mean zero
    assert abs(surprise.mean()) < 4 * surprise.std() / len(surprise) ** 0.5
    assert entropy.mean() < 0.98 * torch.tensor(VOCAB).log()  # else anything would have passed


def test_the_same_seed_gives_the_same_text_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    model = open_model(tmp_path)
    monkeypatch.setattr(sampling, "TOGETHER", 4)
    steps: list[int] = []
    first = sampled_windows(model, N, LENGTH, seed=3, progress=lambda done, total, what: steps.append(done))
    assert steps == [0, 4, 6]
    assert torch.equal(first, sampled_windows(model, N, LENGTH, seed=3))
    assert not torch.equal(first, sampled_windows(model, N, LENGTH, seed=4))


def test_continued_windows_begin_with_pieces_of_the_text(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = open_model(tmp_path)
    text = torch.randint(VOCAB, (3, PROMPT + 20), generator=torch.Generator().manual_seed(1))
    ids = continued_windows(model, text, 2)
    assert ids.shape == (6, PROMPT + 20)
    starts = []
    for n, window in enumerate(ids):
        pieces = text[n % 3].unfold(0, PROMPT, 1)
        starts += (pieces == window[:PROMPT]).all(1).nonzero().flatten().tolist()
    assert len(starts) == 6
    assert len(set(starts)) > 3
    assert torch.equal(ids, continued_windows(model, text, 2))
    assert not torch.equal(ids, continued_windows(model, text, 2, seed=1))
