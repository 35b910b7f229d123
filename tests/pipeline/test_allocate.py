"""Sizes against files that are really written, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import RecipeError
from whit.grids.named import grid_named
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.allocate import Allocator
from whit.pipeline.folder import FolderJob
from whit.pipeline.quantize import write_gguf
from whit.pipeline.targets import BLOCKS, SUPERBLOCKS


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Rows of 64, and of 256 in the feed-forward networks' second matrices."""
    save_tiny("llama", tmp_path / "model", vocab_size=TOY_VOCAB, intermediate_size=256)
    save_toy_tokenizer("llama", tmp_path / "model")
    return open_model(tmp_path / "model")


def damages(allocator: Allocator) -> dict[str, dict[str, float]]:
    """Some that fall with the bits, at another pace for every tensor."""
    return {
        name: {grid: (1 + i % 5) * 4.0 ** -grid_named(grid).bits_per_weight(256) for grid in grids}
        for i, (name, grids) in enumerate(allocator.candidates.items())
    }


def test_a_matrix_may_only_go_where_its_rows_divide(model: Model) -> None:
    found = Allocator(model).candidates
    assert found["blk.0.ffn_down.weight"] == SUPERBLOCKS
    assert found["blk.0.ffn_up.weight"] == found["token_embd.weight"] == BLOCKS
    assert not any("norm" in name for name in found)


def test_the_file_has_the_predicted_bytes_for_26_budgets(model: Model, tmp_path: Path) -> None:
    allocator = Allocator(model, rounding="nearest")
    table, last = damages(allocator), float("inf")
    for i in range(26):
        budget = allocator.least + (allocator.most - allocator.least) * i // 25
        found = allocator.fit(table, budget)
        result = write_gguf(model, found.recipe, tmp_path / "a.gguf", overwrite=True)
        assert found.n_bytes == result.n_bytes == (tmp_path / "a.gguf").stat().st_size <= budget
        assert found.damage <= last
        assert found.bound <= found.damage
        last = found.damage
    assert found.n_bytes == allocator.most


def test_what_cannot_fit_is_refused_with_the_least_and_why(model: Model) -> None:
    allocator = Allocator(model)
    allocator.check(allocator.least)
    with pytest.raises(RecipeError, match=f"has {allocator.least:,}.*rows of 64 weights"):
        allocator.check(allocator.least - 1)


def test_a_promise_is_the_smallest_file_that_keeps_it(model: Model) -> None:
    allocator = Allocator(model)
    table = damages(allocator)
    wanted = allocator.fit(table, (allocator.least + allocator.most) // 2).damage
    found = allocator.promise(table, wanted)
    assert found.damage <= wanted
    if found.n_bytes > allocator.least:
        assert allocator.fit(table, found.n_bytes - 1).damage > wanted
    with pytest.raises(RecipeError, match="the least that is predicted"):
        allocator.promise(table, 0.0)


def test_only_the_grids_that_were_asked_for(model: Model) -> None:
    found = Allocator(model, grids=("q8_0", "q4_k")).candidates
    assert found["blk.0.ffn_down.weight"] == ("q4_k", "q8_0")
    assert found["blk.0.ffn_up.weight"] == ("q8_0",)


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "whit"])
def test_folders_have_the_predicted_bytes_and_layers_that_run_as_one_agree(
    model: Model, tmp_path: Path, layout: str
) -> None:
    allocator = Allocator(model, rounding="nearest", layout=layout)
    table, last = damages(allocator), float("inf")
    for i in range(6):
        budget = allocator.least + (allocator.most - allocator.least) * i // 5
        found = allocator.fit(table, budget)
        result = FolderJob(model, found.recipe).write(tmp_path / "out", overwrite=True)
        written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
        assert found.n_bytes == result.n_bytes == written <= budget
        assert found.damage <= last
        last = found.damage
        grids = allocator.grids(found)
        if layout != "whit":
            for block in range(2):
                for family in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")):
                    assert len({grids[f"blk.{block}.{name}.weight"] for name in family}) == 1
    with pytest.raises(RecipeError, match="16-bit floats"):
        allocator.check(allocator.least - 1)
