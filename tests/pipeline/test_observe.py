"""One walk over the original's blocks, noted in two ways."""

from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.models.open import open_model
from whit.pipeline.observe import gather_statistics, importance_matrix, importance_of
from whit.pipeline.quantize import model_view, plan_gguf
from whit.pipeline.statistics import Statistics
from whit.recipes.named import recipe_named


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_the_diagonal_of_the_statistics_is_the_importance_matrix(tmp_path: Path, kind: str) -> None:
    save_tiny(kind, tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("gpt2" if kind == "gpt2" else "llama", tmp_path / "model")
    model, text = open_model(tmp_path / "model"), torch.tensor(random_tokens(4 * 32, 1)).view(4, 32)
    view, statistics = model_view(model), Statistics(tmp_path / "statistics")
    gather_statistics(model, view, plan_gguf(model, recipe_named("f32")).steps, text, statistics)
    found = importance_of(model, view, statistics, text, "random")
    expected = importance_matrix(model, view, text, "random")
    assert list(found.means) == list(expected.means)
    for name, mean in expected.means.items():
        assert torch.equal(found.counts[name], expected.counts[name])
        assert torch.allclose(found.means[name], mean, rtol=0.03, atol=1e-3)  # by coarse products there
