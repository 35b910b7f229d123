import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llamacpp import llama_cpp_tokens
from toy_tokenizers import FAMILIES, TEXT, TEXTS, save_toy_tokenizer, write_vocabulary
from whit.errors import BrokenFileError, ModelError
from whit.models.builtin import open_smollm2, packaged_smollm2
from whit.models.model import Model
from whit.models.pretokenizers import SPLITTERS
from whit.models.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from whit.models.vocabulary import gguf_vocabulary

CONFIG = {"vocab_size": 512}
# What splitters decide about: blanks, case, digits, signs, scripts, marks, joined emoji, controls.
PIECES = [
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\u2028", "\x1c", "\x00", "\x7f"),
    *("a", "Z", "the", "'s", "'LL", "é", "ß", "ǅ", "ʰ", "Ж", "ª", "µ", "你好", "、", "ひ", "안", "ก็", "हि", "e\u0301"),
    *("1", "23", "4567", "٣", "²", "Ⅷ", "!", "?.", "_", "$", "^~`", "(", "“", "—", "/", "=>", "€"),
    *("🙂", "👩\u200d👧", "\ufe0f", "▁", "<s>", "</s>", "<|im_end|>", "<unk>"),
]
MESSAGES = [{"role": "user", "content": "Hi & <you>"}, {"role": "assistant", "content": "é"}]


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
    assert first.encode("Hi", add_special=True) == second.encode("Hi", add_special=True)
    assert second.decode(second.encode(sample)) == sample


@pytest.mark.parametrize("family", FAMILIES)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES) | st.characters(codec="latin-1")), min_size=50, max_size=200))
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_text_is_cut_as_llama_cpp_cuts_it(
    family: str, tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp(family)
    save_toy_tokenizer(family, folder)
    metadata = gguf_vocabulary(folder, CONFIG)
    file = write_vocabulary(metadata, folder / "vocab.gguf")
    # llama.cpp composes nothing, and knows no rule for texts that begin with a space or have one after a special token
    joined = [unicodedata.normalize("NFC", "".join(pieces)) for pieces in texts]
    plain = [text.lstrip(" ▁") for text in joined if "<" not in text]
    found = llama_cpp_tokens(file, joined + plain)
    of_metadata, of_folder = load_tokenizer(from_metadata(metadata)), load_tokenizer(from_folder(folder))
    assert found[: len(joined)] == [of_metadata.encode(text) for text in joined]
    assert found[len(joined) :] == [of_folder.encode(text) for text in plain]


def test_the_built_in_model_is_cut_as_llama_cpp_cuts_it() -> None:
    tokenizer = load_tokenizer(open_smollm2())
    pieces = [TEXT[start : start + 500] for start in range(0, 20000, 500)] + [
        "<|im_start|>user\nHi<|im_end|>\n",
        *TEXTS,
    ]
    assert llama_cpp_tokens(packaged_smollm2(), pieces) == [tokenizer.encode(piece) for piece in pieces]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(open_smollm2())


# its vocabulary lacks some bytes
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]), max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text


def test_a_long_text_is_encoded_whole_and_without_a_word(
    smollm2: Tokenizer, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    text = (TEXT * 5)[:1_000_000]
    assert smollm2.decode(smollm2.encode(text)) == text
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_the_number_of_tokens_is_that_of_the_file(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152


def test_no_special_tokens_are_added_unless_asked(tmp_path: Path) -> None:
    save_toy_tokenizer("llama3", tmp_path)
    tokenizer = load_tokenizer(from_folder(tmp_path))
    assert tokenizer.encode("hi", add_special=True)[1:] == tokenizer.encode("hi")


@pytest.mark.parametrize("splitter", SPLITTERS, ids=lambda splitter: splitter.name)
def test_what_a_file_leaves_open_is_as_llama_cpp_has_it(splitter: object, tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    metadata = gguf_vocabulary(tmp_path, CONFIG) | {"tokenizer.ggml.pre": splitter.name}  # type: ignore[attr-defined]
    del metadata["tokenizer.ggml.add_bos_token"]
    ids = load_tokenizer(from_metadata(metadata)).encode("", add_special=True)
    # llama-vocab.cpp: these two set add_bos, and token 11 is the first one where none is named
    assert ids == ([11] if metadata["tokenizer.ggml.pre"] in ("llama-bpe", "tekken") else [])


def test_both_ends_of_a_text_are_added_when_a_file_says_so(tmp_path: Path) -> None:
    save_toy_tokenizer("llama", tmp_path)
    metadata = gguf_vocabulary(tmp_path, CONFIG) | {"tokenizer.ggml.add_eos_token": True}
    tokenizer = load_tokenizer(from_metadata(metadata))
    assert tokenizer.encode("Hi", add_special=True) == [1, *tokenizer.encode("Hi"), 2]


def test_white_space_after_phi3s_tokens_is_dropped_as_llama_cpp_does(tmp_path: Path) -> None:
    save_toy_tokenizer("phi3", tmp_path)
    metadata = gguf_vocabulary(tmp_path, CONFIG) | {"general.name": "Phi-3-toy"}
    texts = ["<|user|>\nHello<|end|> \n<|user|>", "<s> Hi"]
    found = llama_cpp_tokens(write_vocabulary(metadata, tmp_path / "vocab.gguf"), texts)
    assert found == [load_tokenizer(from_metadata(metadata)).encode(text) for text in texts]


def test_a_chat_reads_as_transformers_writes_it(tmp_path: Path) -> None:
    model = open_smollm2()
    save_tokenizer(model, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert load_tokenizer(model).chat(MESSAGES) == theirs
    assert load_tokenizer(from_folder(tmp_path)).chat(MESSAGES) == theirs


def test_a_chat_template_sees_the_special_tokens(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    template = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    content = {"bos_token": {"content": "<|endoftext|>"}, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    metadata = gguf_vocabulary(tmp_path, CONFIG)
    for model in (from_folder(tmp_path), from_metadata(metadata)):
        assert load_tokenizer(model).chat(MESSAGES) == "<|endoftext|>Hi & <you>>"


def test_a_chat_without_template_is_nothing(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    assert load_tokenizer(from_folder(tmp_path)).chat(MESSAGES) is None


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{% if %}", "{{ ''.__class__.__mro__ }}"]
)
def test_a_template_that_refuses_says_so(template: str, tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match="chat template does not take these messages"):
        load_tokenizer(from_folder(tmp_path)).chat(MESSAGES)


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}])
def test_an_unknown_kind_of_tokenizer_is_refused(metadata: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="no tokenizer that can be read"):
        load_tokenizer(from_metadata(metadata))


def test_an_unknown_pre_tokenizer_is_refused() -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.pre": "mystery"}
    with pytest.raises(ModelError, match="pre-tokenizer 'mystery' is not known"):
        load_tokenizer(from_metadata(metadata))


@pytest.mark.parametrize(
    ("kind", "wrong", "named"),
    [
        ("gpt2", {"merges": ["x y"]}, "merges"),
        ("gpt2", {"token_type": [1, 1]}, "1 tokens but 2 token types"),
        ("llama", {}, "1 tokens but 0 scores"),
    ],
)
def test_metadata_that_contradict_themselves_are_refused(kind: str, wrong: dict[str, object], named: str) -> None:
    metadata = {"model": kind, "tokens": ["a"], **wrong}
    with pytest.raises(BrokenFileError, match=named):
        load_tokenizer(from_metadata({f"tokenizer.ggml.{name}": value for name, value in metadata.items()}))


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BrokenFileError, match="tokenizer.json"):
        load_tokenizer(from_folder(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_written_one_by_one_give_the_same_text(family: str, tmp_path: Path) -> None:
    save_toy_tokenizer(family, tmp_path)
    tokenizer = load_tokenizer(from_folder(tmp_path))
    for text in ("Hello, world! naïve “café” 你好 🙂🚀 x", " a  b\n\tc", "one two three"):
        ids = tokenizer.encode(text)
        for cut in range(len(ids)):
            writer = tokenizer.writer(ids[:cut])
            pieces = [writer.add(token) for token in ids[cut:]]
            whole = tokenizer.decode(ids[:cut])
            if not whole.endswith("\ufffd"):  # otherwise a prompt ends within a character
                assert whole + "".join(pieces) + writer.rest() == tokenizer.decode(ids)
                assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_is_never_completed_comes_at_the_end(tmp_path: Path) -> None:
    save_toy_tokenizer("gpt2", tmp_path)
    tokenizer = load_tokenizer(from_folder(tmp_path))
    first, *_ = tokenizer.encode("🙂")
    writer = tokenizer.writer()
    assert [writer.add(first), writer.rest()] == ["", "\ufffd"]


@pytest.mark.parametrize(
    ("family", "ends"),
    [("smollm", {"<|endoftext|>", "<|im_end|>"}), ("llama3", {"<|end_of_text|>", "<|eot_id|>"}), ("opt", {"</s>"})],
)
def test_ends_of_an_answer_are_known_by_their_texts(family: str, ends: set[str], tmp_path: Path) -> None:
    save_toy_tokenizer(family, tmp_path)
    tokenizer = load_tokenizer(from_folder(tmp_path))
    assert tokenizer.ends() == {token for text in ends for token in tokenizer.encode(text)}
