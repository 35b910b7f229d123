"""What the names of variants mean, for models of several shapes."""

from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import RecipeError
from whit.models.model import Model
from whit.models.open import open_model
from whit.recipes.files import write_recipe
from whit.release.variants import variants_of


def saved(folder: Path, kind: str, **changes: object) -> Model:
    save_tiny(kind, folder, vocab_size=TOY_VOCAB, **changes)
    save_toy_tokenizer("gpt2" if kind == "gpt2" else "llama", folder)
    return open_model(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return saved(tmp_path_factory.mktemp("variants") / "llama", "llama")


def test_files_are_called_as_people_know_them(llama: Model) -> None:
    found, _ = variants_of(llama, "q4_k_m, Q8_0,gptq-4bit,awq-4bit,w8a8,fp8", "M-1B")
    names = ["M-1B.Q4_K_M.gguf", "M-1B.Q8_0.gguf", "M-1B-GPTQ-4bit", "M-1B-AWQ-4bit", "M-1B-W8A8", "M-1B-FP8"]
    assert [each.file for each in found] == names
    assert found[2].recipe.name == "gptq-4bit-g128"  # groups, as everybody publishes it


def test_auto_leaves_out_what_is_the_same_by_another_name(llama: Model) -> None:
    found, left_out = variants_of(llama, "auto", "m")
    assert [each.name for each in found] == [
        *("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "gptq-4bit", "awq-4bit", "w8a8"),
    ]
    assert left_out == ["q8_0: for this model it has the same type for every tensor as q6_k"]


def test_auto_leaves_out_what_the_model_cannot_be(tmp_path: Path) -> None:
    found, left_out = variants_of(saved(tmp_path / "gpt2", "gpt2"), "auto", "m")  # Conv1D
    assert [each.name for each in found if not each.is_gguf] == ["gptq-4bit"]
    assert len(left_out) == 2
    assert any(line.startswith("awq-4bit: ") and "Conv1D" in line for line in left_out)


def test_a_recipe_in_a_file_is_the_same_variant(llama: Model, tmp_path: Path) -> None:
    named, _ = variants_of(llama, "q4_k_m,gptq-4bit", "m")
    for k, each in enumerate(named):
        write_recipe(each.recipe, tmp_path / f"{k}.json")
    found, _ = variants_of(llama, f"{tmp_path / '0.json'},{tmp_path / '1.json'}", "m")
    for ours, theirs in zip(found, named, strict=True):
        assert (ours.file, ours.n_bytes) == (theirs.file, theirs.n_bytes)
        assert [(s.type, s.rounding) for s in ours.plan.steps] == [(s.type, s.rounding) for s in theirs.plan.steps]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is empty"), ("q4_0,q9_9", "no recipe called 'q9_9'"), ("q4_0,Q4_0", "written twice"), ("x.json", "read")],
)
def test_what_makes_no_sense_is_refused(llama: Model, text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        variants_of(llama, text, "m")
