import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoTokenizer, GPT2Tokenizer

from llamacpp import llama_cpp_tokens
from toy_tokenizers import FAMILIES, TEXTS, TOY_VOCAB, save_toy_tokenizer, write_vocabulary
from whit.checkpoints.gguf import GGUFFile
from whit.errors import BrokenFileError, ModelError
from whit.models.builtin import packaged_smollm2
from whit.models.pretokenizers import QWEN2
from whit.models.vocabulary import Kind, gguf_vocabulary, no_vocabulary

CONFIG = {"vocab_size": TOY_VOCAB}


def key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tokenizer folder and the GGUF vocabulary made from it."""
    folder = tmp_path_factory.mktemp(request.param)
    save_toy_tokenizer(request.param, folder)
    return folder, write_vocabulary(gguf_vocabulary(folder, CONFIG), folder / "vocab.gguf")


def reference(folder: Path, text: str) -> list[int]:
    """The ids that the library which the tokenizer was trained with gives."""
    if (folder / "tokenizer.json").is_file():
        return Backend.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text)


def test_llama_cpp_cuts_texts_as_the_original_library_does(family: tuple[Path, Path]) -> None:
    folder, file = family
    texts = [text for text in TEXTS if "</s>" not in text]  # SentencePiece reads no special tokens in texts
    assert llama_cpp_tokens(file, texts) == [reference(folder, text) for text in texts]


def test_llama_cpp_recognises_the_special_tokens(family: tuple[Path, Path]) -> None:
    _, file = family
    metadata = GGUFFile(file).metadata
    kinds = zip(metadata[key("tokens")], metadata[key("token_type")], strict=True)
    special = [(i, text) for i, (text, kind) in enumerate(kinds) if kind in (Kind.CONTROL, Kind.USER_DEFINED)]
    assert special
    assert llama_cpp_tokens(file, [text for _, text in special]) == [[i] for i, _ in special]


def test_a_space_before_a_text_is_added_for_sentencepiece_models_that_want_one(tmp_path: Path) -> None:
    wanted = {"llama": True, "mistral": True, "phi3": True, "gemma": False, "gemma_json": False, "gpt2": False}
    for name in wanted:
        save_toy_tokenizer(name, tmp_path / name)
    assert {name: gguf_vocabulary(tmp_path / name, CONFIG)[key("add_space_prefix")] for name in wanted} == wanted


@pytest.mark.real_model
def test_the_packaged_model_keeps_its_vocabulary_through_transformers(tmp_path: Path) -> None:
    path = packaged_smollm2()
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    # transformers forgets the pre-tokenizer of a GGUF file and takes GPT-2's: this is what SmolLM2's own folder says
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = gguf_vocabulary(tmp_path, {"vocab_size": 49152})
    packaged = {name: value for name, value in GGUFFile(path).metadata.items() if name.startswith("tokenizer.")}
    assert {name: value for name, value in ours.items() if name != key("add_eos_token")} == packaged
    assert ours[key("add_eos_token")] is False


@pytest.mark.parametrize("text", ["<|im_end|>\n", "<tool_call>{}</tool_call>", "naïve <|im_start|>user"])
def test_tokens_that_are_not_special_are_plain_text_to_be_matched(text: str, tmp_path: Path) -> None:
    save_toy_tokenizer("qwen2", tmp_path)
    vocabulary = gguf_vocabulary(tmp_path, CONFIG)
    kinds = dict(zip(vocabulary[key("tokens")], vocabulary[key("token_type")], strict=True))
    assert (kinds["<tool_call>"], kinds["<|im_end|>"]) == (Kind.USER_DEFINED, Kind.CONTROL)
    file = write_vocabulary(vocabulary, tmp_path / "vocab.gguf")
    assert llama_cpp_tokens(file, [text]) == [reference(tmp_path, text)]


def test_tokens_that_look_special_are_control_tokens_although_the_file_denies_it(tmp_path: Path) -> None:
    save_toy_tokenizer("deepseek3", tmp_path)
    vocabulary = gguf_vocabulary(tmp_path, CONFIG)
    at = vocabulary[key("tokens")].index("<｜tool▁calls▁begin｜>")
    assert vocabulary[key("token_type")][at] == Kind.CONTROL


def test_white_space_after_phi3s_tokens_is_dropped_when_the_file_has_its_name(tmp_path: Path) -> None:
    save_toy_tokenizer("phi3", tmp_path)
    named = gguf_vocabulary(tmp_path, CONFIG) | {"general.name": "Phi-3-toy"}
    texts = ["<|user|>\nHello<|end|> \n<|user|>", "<s> Hi"]
    found = llama_cpp_tokens(write_vocabulary(named, tmp_path / "vocab.gguf"), texts)
    assert found == [reference(tmp_path, text) for text in texts]


def test_unused_rows_are_filled(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    vocabulary = gguf_vocabulary(tmp_path, {"vocab_size": 600})
    assert len(vocabulary[key("tokens")]) == 600
    assert vocabulary[key("tokens")][599] == "[PAD599]"
    assert vocabulary[key("token_type")][599] == Kind.UNUSED


def test_more_tokens_than_rows_is_refused_with_both_numbers(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    with pytest.raises(ModelError, match="ids up to 491 but the model has only 300 rows"):
        gguf_vocabulary(tmp_path, {"vocab_size": 300})


def edited(folder: Path, **parts: Any) -> None:
    """Replace parts of tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def model_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]


def legacy(folder: Path, family: str, settings: dict[str, Any]) -> Path:
    """The same tokenizer as vocab.json and merges.txt, the way GPT-2 and OPT are published."""
    save_toy_tokenizer(family, folder / "new")
    model = model_of(folder / "new")
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_pair_of_gpt2_files_is_enough(tmp_path: Path) -> None:
    old = gguf_vocabulary(legacy(tmp_path, "gpt2", {}), CONFIG)
    assert old == gguf_vocabulary(tmp_path / "new", CONFIG)


def test_opts_pair_of_files_starts_texts_with_its_end_token(tmp_path: Path) -> None:
    settings = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    folder = legacy(tmp_path, "opt", settings | {"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"})
    vocabulary = gguf_vocabulary(folder, CONFIG)
    assert (vocabulary[key("bos_token_id")], vocabulary[key("add_bos_token")]) == (2, True)
    file, transformers = write_vocabulary(vocabulary, folder / "v.gguf"), GPT2Tokenizer.from_pretrained(folder)
    found = llama_cpp_tokens(file, TEXTS)
    assert found == [transformers.encode(text, add_special_tokens=False) for text in TEXTS]


def test_tokens_added_to_a_pair_of_files_are_kept(tmp_path: Path) -> None:
    folder = legacy(tmp_path, "gpt2", {})
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": 500, "<|user|>": 501}))
    vocabulary = gguf_vocabulary(folder, CONFIG)
    assert vocabulary[key("tokens")][499:502] == ["[PAD499]", "<tool>", "<|user|>"]
    assert vocabulary[key("token_type")][499:502] == [Kind.UNUSED, Kind.USER_DEFINED, Kind.CONTROL]


def test_special_tokens_come_from_wherever_they_are_named(tmp_path: Path) -> None:
    save_toy_tokenizer("smollm", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|im_start|>"}, "unk_token": null}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<|im_end|>"}')
    (tmp_path / "generation_config.json").write_text('{"unk_token_id": 0}')
    ids = gguf_vocabulary(tmp_path, CONFIG | {"eos_token_id": [2, 0], "bos_token_id": 0})
    assert [ids[key(f"{name}_token_id")] for name in ("bos", "padding", "eos", "unknown")] == [1, 2, 2, 0]


def test_the_token_that_the_post_processor_adds_is_the_first_token(tmp_path: Path) -> None:
    save_toy_tokenizer("llama3", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "bos_token": null}')
    vocabulary = gguf_vocabulary(tmp_path, CONFIG)
    assert vocabulary[key("add_bos_token")] is True
    assert vocabulary[key("tokens")][vocabulary[key("bos_token_id")]] == "<|begin_of_text|>"


@pytest.mark.parametrize(("setting", "adds"), [("true", True), ("false", False), ("null", False)])
def test_without_a_post_processor_the_settings_say_what_is_added(setting: str, adds: bool, tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(f'{{"add_bos_token": {setting}}}')
    assert gguf_vocabulary(tmp_path, CONFIG)[key("add_bos_token")] is adds


def test_a_sentencepiece_model_alone_adds_its_first_token(tmp_path: Path) -> None:
    save_toy_tokenizer("gemma", tmp_path)
    vocabulary = gguf_vocabulary(tmp_path, CONFIG)
    assert (vocabulary[key("add_bos_token")], vocabulary[key("add_eos_token")]) == (True, False)


def test_ends_of_an_answer_that_llama_cpp_would_not_know_are_named(tmp_path: Path) -> None:
    save_toy_tokenizer("mistral", tmp_path)
    inst = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][-1]["id"]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, inst]}))
    vocabulary = gguf_vocabulary(tmp_path, CONFIG | {"eos_token_id": 2})
    assert (vocabulary[key("eos_token_id")], vocabulary[key("eot_token_id")]) == (2, inst)


def test_ends_of_an_answer_that_llama_cpp_knows_are_left_to_it(tmp_path: Path) -> None:
    save_toy_tokenizer("llama3", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert key("eot_token_id") not in gguf_vocabulary(tmp_path, CONFIG | {"eos_token_id": 1})


@pytest.mark.parametrize(
    "settings",
    [
        '{"chat_template": "T"}',
        '{"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "T"}]}',
    ],
)
def test_a_chat_template_is_found(tmp_path: Path, settings: str) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    assert "tokenizer.chat_template" not in gguf_vocabulary(tmp_path, CONFIG)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    assert gguf_vocabulary(tmp_path, CONFIG)["tokenizer.chat_template"] == "T"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert gguf_vocabulary(tmp_path, CONFIG)["tokenizer.chat_template"] == "J"


def test_an_unknown_pre_tokenizer_is_refused_with_what_was_found(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    own = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]
    edited(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, own]})
    with pytest.raises(ModelError, match=r"Whitespace then ByteLevel\+split. Known: gpt-2"):
        gguf_vocabulary(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("family", "normalizer", "found"),
    [
        ("gpt2", {"type": "Lowercase"}, "Lowercase"),
        ("gpt2", {"type": "Prepend", "prepend": "▁"}, "Prepend ▁"),
        ("phi3", {"type": "Sequence", "normalizers": [{"type": "Strip"}]}, "Strip"),
        ("phi3", {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}, "Replace 'a' by 'b'"),
    ],
)
def test_a_normalizer_that_llama_cpp_lacks_is_refused(
    family: str, normalizer: dict[str, Any], found: str, tmp_path: Path
) -> None:
    save_toy_tokenizer(family, tmp_path)
    edited(tmp_path, normalizer=normalizer)
    with pytest.raises(ModelError, match=f"changes text before splitting it .*{found}"):
        gguf_vocabulary(tmp_path, CONFIG)


def test_sentencepiece_that_splits_at_spaces_is_refused(tmp_path: Path) -> None:
    save_toy_tokenizer("mistral", tmp_path)
    edited(tmp_path, pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True})
    with pytest.raises(ModelError, match=r"Metaspace\+split"):
        gguf_vocabulary(tmp_path, CONFIG)


@pytest.mark.parametrize("option", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_marks_inside_words_are_refused(option: str, tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    edited(tmp_path, model=model_of(tmp_path) | {option: "</w>"})
    with pytest.raises(ModelError, match=f"{option} = '</w>'"):
        gguf_vocabulary(tmp_path, CONFIG)


def test_two_tokens_of_one_text_are_refused_because_llama_cpp_would_end_the_process(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    tokens = [{"id": 500, "content": "a", "special": False}]
    edited(tmp_path, added_tokens=tokens)
    with pytest.raises(ModelError, match="tokens .* and 500 are both 'a'"):
        gguf_vocabulary(tmp_path, CONFIG)


def test_a_tokenizer_that_is_not_bpe_is_refused(tmp_path: Path) -> None:
    Backend(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="WordPiece tokenizer; only BPE"):
        gguf_vocabulary(tmp_path, CONFIG)


def test_a_folder_without_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer.json, tokenizer.model, vocab.json"):
        gguf_vocabulary(tmp_path, CONFIG)


def test_a_broken_sentencepiece_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x00nonsense")
    with pytest.raises(BrokenFileError, match="tokenizer.model"):
        gguf_vocabulary(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"type": "BPE", "merges": []}},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}},
        {"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}, "pre_tokenizer": {}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "Split"}},
        {"model": {"type": "BPE", "vocab": ["a"], "merges": 3}, "added_tokens": [{}]},
        {"model": "BPE"},
    ],
)
def test_a_tokenizer_with_missing_parts_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated"}
    usual = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": usual} | content))
    with pytest.raises(ModelError):
        gguf_vocabulary(tmp_path, CONFIG)


def test_llama_cpp_loads_a_file_that_says_it_has_no_vocabulary(tmp_path: Path) -> None:
    file = write_vocabulary(no_vocabulary() | {"llama.vocab_size": 10}, tmp_path / "none.gguf")
    assert llama_cpp_tokens(file, []) == []
