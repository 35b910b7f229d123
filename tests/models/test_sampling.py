"""Text that a model writes, against the model's own distribution."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiny import TINY, VOCAB, save_tiny
from whit.models import sampling
from whit.models.open import open_model
from whit.models.sampling import SHARE, resampled_windows, sampled_windows
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


def test_a_text_is_drawn_anew_in_part(tmp_path: Path) -> None:
    """Where tokens differ they are draws: their mean log-likelihood is minus the entropy, as above."""
    save_tiny("llama", tmp_path)
    model = open_model(tmp_path)
    text = torch.randint(VOCAB, (20, 64), generator=torch.Generator().manual_seed(1))
    ids = resampled_windows(model, text, 3)
    assert ids.shape == (60, 64)
    other = ids != text.repeat(3, 1)
    assert not other[:, 0].any()
    assert abs(other.float().mean() / SHARE - 1) < 0.1
    assert not torch.equal(ids[:20], ids[20:40])
    with torch.inference_mode():
        logs = load_module(model, torch.bfloat16)(input_ids=text, use_cache=False).logits.float().log_softmax(-1)
    logs, at = logs.repeat(3, 1, 1)[:, :-1], other[:, 1:]
    drawn = logs.gather(-1, ids[:, 1:, None])[..., 0][at]
    surprise = drawn + -(logs.exp() * logs).sum(-1)[at]
    assert abs(surprise.mean()) < 4 * surprise.std() / len(surprise) ** 0.5
    assert torch.equal(ids, resampled_windows(model, text, 3))
    assert not torch.equal(ids, resampled_windows(model, text, 3, seed=1))


@pytest.mark.real_model
@pytest.mark.parametrize(("factor", "chosen"), [(1.0, "sdpa"), (1.3, "eager")])
def test_the_faster_attention_is_taken_where_it_gives_the_same(
    factor: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty blocks in bfloat16 differ by three hundredths from one way to the other, which is no other function."""
    module = load_module(open_model("smollm2-135m"), torch.bfloat16)
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def another(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return factor * attention(*args, **kwargs)[0], None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", another)
    with torch.inference_mode():
        sampling._choose_attention(cast(Any, module))
    assert cast(Any, module).config._attn_implementation == chosen
