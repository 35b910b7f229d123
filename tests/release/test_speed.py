"""Speed, by llama.cpp's own clock."""

from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import BrokenFileError
from whit.models.open import open_model
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named
from whit.release.speed import machine, tokens_per_second


def test_a_file_is_run_and_a_damaged_one_is_no_traceback(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    out = tmp_path / "out.gguf"
    write_gguf(open_model(tmp_path / "model"), recipe_named("q8_0"), out)
    assert tokens_per_second(out) > 1
    out.write_bytes(out.read_bytes()[:-5000])
    with pytest.raises(BrokenFileError):
        tokens_per_second(out)


def test_the_machine_is_named() -> None:
    assert "core" in machine()
    assert "xllamacpp" in machine()
