"""Budgets on the command line: what they mean, what is refused, and files that keep them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run
from whit.cli.budget import file_bytes, parse_size, read_damages, write_damages
from whit.errors import RecipeError
from whit.memory import run_bytes
from whit.models.open import open_model
from whit.pipeline.allocate import Allocator
from whit.shape import shape_from_config

FAST = ["--preset", "fast", "--windows", "3"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    save_tiny("llama", path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", path)
    return path


@pytest.fixture(scope="module")
def swept(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What an own sweep would find, once for all: it is most of the work of a budget."""
    table = tmp_path_factory.mktemp("table") / "table.json"
    assert run(["plan", str(llama), "--windows", "3", "--save", str(table)]) == 0
    return [*FAST, "--table", str(table)]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("95MB", 95_000_000), ("4GiB", 4 * 2**30), ("3.5 GB", 3_500_000_000), ("95_000_000", 95_000_000), (".5kb", 500)],
)
def test_sizes_as_people_write_them(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "big", "4 parsecs", "-3GB", "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a size"):
        parse_size(text)


def test_a_context_takes_its_share(llama: Path) -> None:
    model = open_model(llama)
    allocator = Allocator(model)
    left = file_bytes(model, allocator, "2MB", None, 100)
    assert run_bytes(left, shape_from_config(model.config), 100).total == pytest.approx(2e6, abs=1)
    with pytest.raises(RecipeError, match="cache of keys and values"):
        file_bytes(model, allocator, str(allocator.least + 1), None, 100)
    with pytest.raises(RecipeError, match="reads at most 128 tokens"):
        file_bytes(model, allocator, "2GB", None, 129)


def test_a_file_that_fits_and_its_recipe_again(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, recipe = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "a.json"
    budget = Allocator(open_model(llama)).least + 20_000
    arguments = ["quantize", str(llama), *FAST]
    assert run([*arguments, "--fit", str(budget), "-o", str(first), "--save-recipe", str(recipe)]) == 0
    assert first.stat().st_size <= budget
    assert f"{first.stat().st_size:,}" in capsys.readouterr().out
    assert run([*arguments, "--recipe", str(recipe), "-o", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_bits_per_weight_are_those_of_the_whole_file(llama: Path, swept: list[str], tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    model = open_model(llama)
    allocator = Allocator(model)
    bits = 8 * allocator.least / allocator.n_weights + 1
    assert run(["quantize", str(llama), *swept, "--bpw", f"{bits:.3f}", "-o", str(out)]) == 0
    assert 8 * out.stat().st_size / allocator.n_weights <= bits


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "exactly one of --recipe, --fit, --bpw"),
        (["--recipe", "q4_0", "--fit", "1MB"], "exactly one of"),
        (["--recipe", "q4_0", "--context", "8"], "--context"),
        (["--fit", "1MB", "--pure"], "--save-recipe"),
        (["--fit", "1kB"], "the smallest file of this model"),
        (["--fit", "1MB", "--table", "missing.json"], "cannot be read"),
    ],
)
def test_requests_that_make_no_sense(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(["quantize", str(llama), *arguments, *FAST, "-o", str(tmp_path / "a.gguf")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()


def test_a_sweep_is_kept_and_belongs_to_its_model(llama: Path, tmp_path: Path) -> None:
    allocator = Allocator(open_model(llama))
    table = {name: dict.fromkeys(grids, 0.25) for name, grids in allocator.candidates.items()}
    write_damages(table, tmp_path / "a.json")
    assert read_damages(tmp_path / "a.json", allocator) == table
    for wrong in ({"nats_per_token": {}}, {}, {"nats_per_token": {**table, "token_embd.weight": {"q8_0": "x"}}}):
        (tmp_path / "a.json").write_text(json.dumps(wrong))
        with pytest.raises(RecipeError, match="not what `whit plan --save` writes for this model"):
            read_damages(tmp_path / "a.json", allocator)


def test_a_promise_is_kept_on_text_that_was_not_read(
    llama: Path, swept: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for i, most in enumerate(("0.2", "0.01")):
        out = tmp_path / f"{i}.gguf"
        assert run(["quantize", str(llama), *swept, "--max-kl", most, "-o", str(out)]) == 0
        shown = capsys.readouterr().out
        tried = [line.split() for line in shown.splitlines() if "of their own" in line]
        assert any(
            float(words[-1]) <= float(most) and int(words[7].replace(",", "")) == out.stat().st_size for words in tried
        )
        sizes.append(out.stat().st_size)
    assert sizes[0] < sizes[1]
    assert run(["quantize", str(llama), *swept, "--max-kl", "1e-12", "-o", str(tmp_path / "no.gguf")]) == 2
    assert not (tmp_path / "no.gguf").exists()


def test_repair_keeps_what_is_measured_to_be_better(
    llama: Path, swept: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.gguf"
    budget = Allocator(open_model(llama)).least + 20_000
    assert run(["quantize", str(llama), *swept, "--fit", str(budget), "--repair", "3", "-o", str(out)]) == 0
    tried = [line for line in capsys.readouterr().out.splitlines() if "of their own" in line]
    assert len(tried) == 4
    assert "as predicted" in tried[0]
    assert out.stat().st_size <= budget
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
