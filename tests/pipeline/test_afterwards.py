"""A file that was just written beside what was to be written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile
from whit.grids.quantized import QuantizedTensor
from whit.models.open import open_model
from whit.pipeline import afterwards
from whit.pipeline.afterwards import Intended, affordable, look
from whit.pipeline.folder import write_model
from whit.recipes.folders import folder_recipe
from whit.recipes.recipe import Recipe, Rule


def saved(folder: Path, kind: str) -> Path:
    save_tiny(kind, folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("gpt2" if kind == "gpt2" else "llama", folder)
    return folder


def recipe_of(name: str) -> Recipe:
    return folder_recipe(name) or Recipe(name, (Rule("*", name),))


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2", "phi3"])
@pytest.mark.parametrize("recipe", ["q4_0", "gptq-4bit-g32", "whit-int3-g32-asym"])
def test_what_was_written_is_what_was_intended(tmp_path: Path, kind: str, recipe: str) -> None:
    model = open_model(saved(tmp_path / "model", kind))
    intended = Intended()
    path = write_model(model, recipe_of(recipe), tmp_path / "out.gguf", watch=intended).path
    found = look(path, model, 64, intended)
    assert found.faults == ()
    assert found.compared == len(intended) > 0
    assert found.result is not None
    assert found.result.tokens == 2 * 31


def test_a_code_that_is_not_intended_is_a_fault(tmp_path: Path) -> None:
    model = open_model(saved(tmp_path / "model", "llama"))
    intended = Intended()
    write_model(model, recipe_of("q4_0"), tmp_path / "out.gguf", watch=intended)
    file = GGUFFile(tmp_path / "out.gguf")
    raw = file.raw("blk.1.attn_k.weight")
    raw[100] ^= 16  # one code, by one step
    with (tmp_path / "changed.gguf").open("wb") as out:
        file.with_changes(out, [("blk.1.attn_k.weight", raw)])
    found = look(tmp_path / "changed.gguf", model, 64, intended)
    assert found.faults == ("1 of 21 tensors are not what was to be written (blk.1.attn_k.weight)",)
    assert found.verdict is not None
    assert not found.verdict.passed


def test_two_columns_exchanged_are_seen() -> None:
    from whit.grids.named import grid_named
    from whit.rounding.nearest import nearest

    def sketch(matrix: QuantizedTensor) -> Callable[[torch.Tensor], bool]:
        expected = afterwards._sketch(matrix.dequantize())
        return lambda W: afterwards._same(W, expected)

    matrix = nearest(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), grid_named("q4_0"))
    same = sketch(matrix)
    W = matrix.dequantize()
    assert same(W)
    W[:, [3, 4]] = W[:, [4, 3]]
    assert not same(W)


def test_what_takes_too_long_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(saved(tmp_path / "model", "llama"))
    assert affordable(model, 64) == (2, "")
    monkeypatch.setattr(afterwards, "MOST_WORK", 1e6)
    n, reason = affordable(model, 64)
    assert n == 0
    assert "longer than a minute" in reason
    monkeypatch.setattr(afterwards, "ROOM", 1e12)
    assert "GB are free" in affordable(model, 64)[1]


def test_a_file_that_cannot_be_opened_is_a_fault(tmp_path: Path) -> None:
    model = open_model(saved(tmp_path / "model", "llama"))
    (tmp_path / "out.gguf").write_bytes(b"GGUF")
    found = look(tmp_path / "out.gguf", model, 64, Intended())
    assert found.verdict is not None
    assert found.verdict.word == "broken"
