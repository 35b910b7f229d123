from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp import llama_cpp_tokens
from toy_tokenizers import FAMILIES, TEXT, save_toy_tokenizer
from whit.errors import BrokenFileError, ModelError
from whit.models.builtin import open_smollm2, packaged_smollm2
from whit.models.model import Model
from whit.models.tokenizer import Tokenizer, load_tokenizer
from whit.models.vocabulary import gguf_vocabulary

CONFIG = {"vocab_size": 512}


def from_folder(folder: Path) -> Model:
    return Model("toy", CONFIG, None, 0, tokenizer_dir=folder)  # type: ignore[arg-type]


def from_metadata(metadata: dict[str, object]) -> Model:
    return Model("toy", CONFIG, None, 0, gguf_metadata=metadata)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_metadata_alone_give_the_tokenizer_of_the_folder(family: str, tmp_path: Path) -> None:
    save_toy_tokenizer(family, tmp_path)
    first = load_tokenizer(from_folder(tmp_path))
    second = load_tokenizer(from_metadata(gguf_vocabulary(tmp_path, CONFIG)))
    sample = TEXT[:20000]
    assert first.encode(sample) == second.encode(sample)
    assert second.decode(second.encode(sample)) == sample


def test_the_built_in_model_is_cut_as_llama_cpp_cuts_it() -> None:
    tokenizer = load_tokenizer(open_smollm2())
    pieces = [TEXT[start : start + 500] for start in range(0, 20000, 500)] + ["<|im_start|>user\nHi<|im_end|>\n"]
    assert llama_cpp_tokens(packaged_smollm2(), pieces) == [tokenizer.encode(piece) for piece in pieces]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(open_smollm2())


@given(
    text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]), max_size=60)
)  # its vocabulary lacks some bytes
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text


def test_no_special_tokens_are_added_unless_asked(tmp_path: Path) -> None:
    save_toy_tokenizer("llama3", tmp_path)
    tokenizer = load_tokenizer(from_folder(tmp_path))
    assert tokenizer.encode("hi", add_special=True)[1:] == tokenizer.encode("hi")


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}])
def test_an_unknown_kind_of_tokenizer_is_refused(metadata: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="no tokenizer that can be read"):
        load_tokenizer(from_metadata(metadata))


def test_an_unknown_pre_tokenizer_is_refused() -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.pre": "mystery"}
    with pytest.raises(ModelError, match="pre-tokenizer 'mystery' is not known"):
        load_tokenizer(from_metadata(metadata))


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BrokenFileError, match="tokenizer.json"):
        load_tokenizer(from_folder(tmp_path))
