import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from llamacpp import llama_cpp_tokens
from toy_tokenizers import TEXTS, save_toy_tokenizer, write_vocabulary
from whit.errors import ModelError
from whit.models.model import Model
from whit.models.pretokenizers import GPT2, QWEN2, SPLITTERS, Splitter, pretokenizer_name, splitter_named
from whit.models.tokenizer import load_tokenizer
from whit.models.vocabulary import gguf_vocabulary

MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}


def tokenizer_with(splitter: pre_tokenizers.PreTokenizer | None, **model: Any) -> dict[str, Any]:
    content = None if splitter is None else json.loads(splitter.__getstate__())
    return {"pre_tokenizer": content, "model": MODEL | model}


def byte_level(use_regex: bool, add_prefix_space: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def split(regex: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), behavior, invert), byte_level(False)])


@pytest.mark.parametrize(
    ("splitter", "name"),
    [
        (byte_level(True), "gpt-2"),
        (split(GPT2), "gpt-2"),
        (split(QWEN2), "qwen2"),
        (split(QWEN2, "removed", True), "qwen2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(True)]), "smollm"),
        (pre_tokenizers.Sequence([pre_tokenizers.Sequence([byte_level(True)])]), "gpt-2"),
    ],
)
def test_a_structure_has_llama_cpps_name(splitter: pre_tokenizers.PreTokenizer, name: str) -> None:
    assert pretokenizer_name(tokenizer_with(splitter), "here") == name


@pytest.mark.parametrize(
    ("splitter", "found"),
    [
        (None, "no pre-tokenizer"),
        (pre_tokenizers.Whitespace(), "Whitespace"),
        (byte_level(True, add_prefix_space=True), "ByteLevel\\+split after a space"),
        (split(QWEN2, "merged_with_next"), "Split MergedWithNext"),
        (split(QWEN2, "isolated", True), "Split Isolated inverted"),
        (split("a|b"), "Split a\\|b then ByteLevel"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), byte_level(True)]), "Digits then ByteLevel"),
    ],
)
def test_another_structure_is_refused_with_what_was_found(
    splitter: pre_tokenizers.PreTokenizer | None, found: str
) -> None:
    with pytest.raises(ModelError, match=f"here: .*: {found}.*Known: gpt-2"):
        pretokenizer_name(tokenizer_with(splitter), "here")


def test_looking_words_up_first_is_the_same_where_merges_reach_every_token() -> None:
    assert pretokenizer_name(tokenizer_with(split(QWEN2), ignore_merges=True), "here") == "qwen2"


def test_looking_words_up_first_is_refused_where_it_matters_and_cannot_be_said() -> None:
    tokenizer = tokenizer_with(split(QWEN2), ignore_merges=True, merges=[])
    with pytest.raises(ModelError, match=r"'qwen2', .*the token 'ab' would be lost"):
        pretokenizer_name(tokenizer, "here")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ModelError, match="pre-tokenizer 'mystery' is not known. Known: a.x-4.0, "):
        splitter_named("mystery", "here")


@pytest.mark.parametrize("splitter", SPLITTERS, ids=lambda splitter: splitter.name)
def test_llama_cpp_knows_every_name_and_splits_as_the_table_says(splitter: Splitter, tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    metadata = gguf_vocabulary(tmp_path, {"vocab_size": 512})
    for name in (splitter.name, *splitter.synonyms):
        named = metadata | {"tokenizer.ggml.pre": name}
        tokenizer = load_tokenizer(Model("toy", {}, None, 0, gguf_metadata=named))  # type: ignore[arg-type]
        path = write_vocabulary(named, tmp_path / f"{name}.gguf")
        assert llama_cpp_tokens(path, TEXTS) == [tokenizer.encode(text) for text in TEXTS], name
