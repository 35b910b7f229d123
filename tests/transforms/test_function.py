"""Folds against the function of whole models in float64: powers of two, so that weights change exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny import TINY, random_tokens, save_tiny
from whit.models.architecture import gguf_view
from whit.models.links import Links
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.folding import folded_values
from whit.pipeline.quantize import plan_gguf
from whit.recipes.named import recipe_named
from whit.transforms.absorb import block_pairs

BLOCK = 1
PAIRS = {"llama": 4, "gemma3_text": 4, "mixtral": 2, "gpt2": 2}


def logits(module: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return module(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", TINY)
def test_every_pair_leaves_the_logits_as_they_were(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = open_model(tmp_path)
    view, ids = gguf_view(model), torch.tensor([random_tokens(24)])
    steps = {step.tensor.name: step for step in plan_gguf(model, recipe_named("q4_0", "feedback")).steps}
    heads = view.metadata.get(f"{view.architecture}.attention.head_count_kv", 0)
    pairs = block_pairs({n: s.tensor.shape for n, s in steps.items()}, f"blk.{BLOCK}.", heads)
    module, links = load_module(model).double(), Links(view)
    module.config._experts_implementation = "eager"  # the grouped product of torch has no float64
    before = logits(module, ids)
    assert len(pairs) == PAIRS.get(name, len(pairs))
    for pair in pairs:
        powers = torch.randint(-3, 4, (int(pair.channel.max()) + 1,), generator=torch.Generator().manual_seed(0))
        values = folded_values(pair, torch.exp2(powers.float()), steps)
        assert {n for n, _ in values} == {*pair.producers, *pair.consumers}
        for tensor, changed in values:
            links.replace(tensor, changed)
        with torch.no_grad():
            for parameter, held in module.named_parameters():
                if f".{BLOCK}." not in parameter:
                    continue
                held.copy_(links.read(parameter, tuple(held.shape)))
        links.restore()
        torch.testing.assert_close(logits(module, ids), before, rtol=1e-9, atol=1e-9)
