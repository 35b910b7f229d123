import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from llamacpp import llama_cpp_tokens
from toy_tokenizers import FAMILIES, TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile, GGUFWriter
from whit.errors import BrokenFileError, ModelError
from whit.models.builtin import open_smollm2, packaged_smollm2
from whit.models.model import Model
from whit.models.tokenizer import load_tokenizer, save_tokenizer
from whit.models.vocabulary import Kind, gguf_vocabulary, no_vocabulary

CONFIG = {"vocab_size": TOY_VOCAB}
ARCHITECTURE = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
TEXTS = [
    "",
    "Hello, world!",
    "I've told him it's 'fine', you'll see they'd WE'RE.",
    "1 22 333 4444 55555 3.14159 1e-5 2024-11-23",
    "def f(x):\n    if x:\n\t\treturn x ** 2  # squared\n",
    "a  b   c    d        e",
    " leading and trailing ",
    "\n\n\nnew\r\nlines\n",
    "naïve café Ünïcödé ß",
    "你好，世界。こんにちは 안녕",
    "emoji 🙂🚀 and 👩‍👩‍👧",
    "CamelCaseWords and SCREAMING_SNAKE",
    "…“quotes”—dashes–and «more»",
    "\u00a0non-breaking\u2003wide",
]


def vocabulary_only(metadata: dict[str, object], path: Path) -> Path:
    with path.open("wb") as file:
        GGUFWriter(ARCHITECTURE | metadata, []).write(file, [])
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tokenizer folder and the GGUF vocabulary made from it."""
    folder = tmp_path_factory.mktemp(request.param)
    save_toy_tokenizer(request.param, folder)
    return folder, vocabulary_only(gguf_vocabulary(folder, CONFIG), folder / "vocab.gguf")


def test_llama_cpp_cuts_texts_as_the_tokenizer_of_the_folder_does(family: tuple[Path, Path]) -> None:
    folder, file = family
    tokenizer = load_tokenizer(Model("toy", CONFIG, None, 0, tokenizer_dir=folder))  # type: ignore[arg-type]
    assert llama_cpp_tokens(file, TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_llama_cpp_recognises_the_special_tokens(family: tuple[Path, Path]) -> None:
    _, file = family
    metadata = GGUFFile(file).metadata
    kinds = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    special = [(i, text) for i, (text, kind) in enumerate(kinds) if kind == Kind.CONTROL]
    assert special
    assert llama_cpp_tokens(file, [text for _, text in special]) == [[i] for i, _ in special]


def test_the_packaged_model_keeps_its_vocabulary(tmp_path: Path) -> None:
    packaged = GGUFFile(packaged_smollm2()).metadata
    save_tokenizer(open_smollm2(), tmp_path)
    ours = gguf_vocabulary(tmp_path, {"vocab_size": 49152})
    for key in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token", "model"):
        assert ours[f"tokenizer.ggml.{key}"] == packaged[f"tokenizer.ggml.{key}"]
    assert ours["tokenizer.chat_template"] == packaged["tokenizer.chat_template"]


def test_unused_rows_are_filled(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    tokens = gguf_vocabulary(tmp_path, {"vocab_size": 600})["tokenizer.ggml.tokens"]
    assert len(tokens) == 600
    assert tokens[599] == "[PAD599]"


def test_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    with pytest.raises(ModelError, match="has only 300 rows"):
        gguf_vocabulary(tmp_path, {"vocab_size": 300})


def test_a_pair_of_gpt2_files_is_enough(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path / "new")
    content = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in content["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    legacy, new = gguf_vocabulary(tmp_path, CONFIG), gguf_vocabulary(tmp_path / "new", CONFIG)
    assert {k: v for k, v in legacy.items() if k != "x"} == new


def test_special_tokens_come_from_wherever_they_are_named(tmp_path: Path) -> None:
    save_toy_tokenizer("smollm", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|im_start|>"}}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<|im_end|>"}')
    ids = gguf_vocabulary(tmp_path, CONFIG | {"eos_token_id": [2, 0], "bos_token_id": 0})
    assert ids["tokenizer.ggml.bos_token_id"] == 1
    assert ids["tokenizer.ggml.padding_token_id"] == 2
    assert ids["tokenizer.ggml.eos_token_id"] == 2


@pytest.mark.parametrize(
    "settings",
    [
        '{"chat_template": "T"}',
        '{"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "T"}]}',
    ],
)
def test_a_chat_template_is_found(tmp_path: Path, settings: str) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    assert gguf_vocabulary(tmp_path, CONFIG)["tokenizer.chat_template"] == "T"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert gguf_vocabulary(tmp_path, CONFIG)["tokenizer.chat_template"] == "J"


def test_an_unknown_pre_tokenizer_is_refused_with_what_was_found(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, content["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"Whitespace then ByteLevel\+split. Known: dbrx|Whitespace then"):
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


def test_a_file_without_vocabulary_says_so() -> None:
    assert no_vocabulary() == {"tokenizer.ggml.model": "none"}
