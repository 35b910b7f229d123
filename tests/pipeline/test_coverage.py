"""What experts saw of a text, counted against the router's own choices."""

from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit import products
from whit.cli.result import coverage_lines
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.coverage import coverage
from whit.pipeline.effort import Calibration, TensorLoss
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named
from whit.rounding.methods import Effort


def loss(name: str, n_tokens: int, note: str = "") -> TensorLoss:
    return TensorLoss(name, "Q4_0", "feedback", 1.0, 2.0, n_tokens, 0, 0, note)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_tokens_of_every_expert_are_those_that_the_router_sends(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)  # a router may decide otherwise on rounded inputs
    save_tiny(kind, tmp_path, vocab_size=TOY_VOCAB, num_hidden_layers=1)
    save_toy_tokenizer("llama", tmp_path)
    model, text = open_model(tmp_path), torch.tensor(random_tokens(3 * 16)).view(3, 16)
    module, sent = load_module(model), torch.zeros(4, dtype=torch.int64)
    layer = module.get_submodule("model.layers.0.mlp.experts")

    def count(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sent.add_(torch.bincount(args[1].flatten(), minlength=4))

    layer.register_forward_pre_hook(count)
    with torch.no_grad():
        module(input_ids=text)
    calibration = Calibration(text, 0.0, Effort(sweeps=0, rescale=False))
    result = write_gguf(model, recipe_named("q4_0", "gptq"), tmp_path / "a", calibration=calibration)
    found = coverage(result.losses)
    assert [each.n_tokens for each in found] == sent.tolist()
    assert sent.sum() == 2 * text.numel()
    assert all(each.thin for each in found)  # 48 tokens are fewer than four per input


def test_the_warning_names_the_experts_that_saw_least() -> None:
    losses = (
        loss("blk.0.attn_q.weight", 10),
        *(loss("blk.0.ffn_up_exps.weight", n, note) for n, note in ((900, ""), (3, _thin()), (0, _unseen()))),
        *(loss("blk.1.ffn_up_exps.weight", 900) for _ in range(3)),
    )
    (line,) = coverage_lines(losses)
    assert line.startswith("Warning: 2 of 6 experts saw too few")
    assert "blk.0 expert 2 (0), blk.0 expert 1 (3). More" in line
    assert coverage_lines(losses[:1]) == []


def _thin() -> str:
    return "fewer than 4 tokens per input: backed by the other experts' moments; second moments needed 10 times"


def _unseen() -> str:
    return "no calibration token came here: moments of the other experts"
