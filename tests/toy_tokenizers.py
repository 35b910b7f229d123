"""Small tokenizers, trained on Python's own documentation, cut as the real ones of each family cut; texts for them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from whit.checkpoints.gguf import GGUFWriter
from whit.models.pretokenizers import DEEPSEEK3, DEEPSEEK_CODER, GPT4O, LLAMA3, QWEN2, QWEN35, TEKKEN

TOY_VOCAB = 512
ARCHITECTURE = {  # what llama.cpp asks of a file before it looks at the vocabulary
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
    "trailing ",
    "\n\n\nnew\r\nlines\n",
    "naïve café Ünïcödé ß",
    "你好，世界。こんにちは 안녕",
    "emoji 🙂🚀 and 👩‍👩‍👧",
    "CamelCaseWords and SCREAMING_SNAKE",
    "…“quotes”—dashes–and «more»",
    "\u00a0non-breaking\u2003wide",
    "x = y; z+=1 <b>&amp;</b> $5 ^_^ `code` ~| {[()]}",
    "a special </s> or <|endoftext|> or <|im_end|>in a text<|eot_id|>",
]
TEXT = "\n".join(topics[name] for name in sorted(topics)[:30]) + "\n12 345 6789 naïve café — “quoted” 你好 🙂\n"


def _byte_level(
    path: Path,
    splits: list[pre_tokenizers.PreTokenizer],
    use_regex: bool,
    specials: list[str],
    nfc: bool = False,
    bos: str | None = None,
    whole_words_first: bool = False,
    plain: tuple[str, ...] = (),
) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words_first))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level]) if splits else byte_level
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOY_VOCAB - 20,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(path / "tokenizer.json"))


def _gpt2(path: Path) -> None:
    _byte_level(path, [], True, ["<|endoftext|>"])


def _opt(path: Path) -> None:
    _byte_level(path, [], True, ["<s>", "<pad>", "</s>", "<unk>"], bos="</s>")


def _gpt_neox(path: Path) -> None:
    _byte_level(path, [], True, ["<|endoftext|>", "<|padding|>"], nfc=True, plain=("        ", "    ", "  "))


def _smollm(path: Path) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    _byte_level(path, [digits], True, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def _isolated(*regexes: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]


def _llama3(path: Path) -> None:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    _byte_level(path, _isolated(LLAMA3), False, specials, bos="<|begin_of_text|>", whole_words_first=True)


def _qwen2(path: Path) -> None:
    specials, tools = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ("<tool_call>", "</tool_call>")
    _byte_level(path, _isolated(QWEN2), False, specials, nfc=True, plain=tools)


def _tekken(path: Path) -> None:
    _byte_level(path, _isolated(TEKKEN), False, ["<unk>", "<s>", "</s>"], bos="<s>", whole_words_first=True)


def _phi4(path: Path) -> None:
    """Llama 3's split, written the other way round, and merges alone."""
    split = pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True)
    _byte_level(path, [split], False, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def _qwen35(path: Path) -> None:
    _byte_level(path, _isolated(QWEN35), False, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], nfc=True)


def _gpt4o(path: Path) -> None:
    _byte_level(path, _isolated(GPT4O), False, ["<|endoftext|>", "<|end|>"])


# Names in ASCII first: llama.cpp's log shows them, and cuts them within a character.
_DEEPSEEK_SPECIALS = ["<|endoftext|>", "<|EOT|>", "<|user|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]


def _deepseek3(path: Path) -> None:
    _byte_level(path, _isolated(*DEEPSEEK3), False, _DEEPSEEK_SPECIALS, plain=("<｜tool▁calls▁begin｜>",))


def _deepseek_coder(path: Path) -> None:
    splits = [*_isolated(*DEEPSEEK_CODER), pre_tokenizers.Digits(individual_digits=True)]
    _byte_level(path, splits, False, _DEEPSEEK_SPECIALS)


def _falcon(path: Path) -> None:
    """Splits after it has mapped bytes, which no other does."""
    _byte_level(path, [], True, ["<|endoftext|>"])
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    byte_level, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("contiguous"), byte_level, digits, *_isolated("[0-9][0-9][0-9]")]
    )
    tokenizer.save(str(path / "tokenizer.json"))


def _sentencepiece_model(path: Path, add_dummy_prefix: bool, user_defined: list[str]) -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=out,
        vocab_size=TOY_VOCAB,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=add_dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=user_defined,
        character_coverage=0.999,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(out.getvalue())


def _llama(path: Path) -> None:
    _sentencepiece_model(path, True, [])
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def _gemma(path: Path) -> None:
    _sentencepiece_model(path, False, ["<start_of_turn>", "<end_of_turn>"])


def _sentencepiece_json(
    path: Path,
    prefixed: bool,
    normalizer: normalizers.Normalizer | None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
    specials: list[str | AddedToken],
) -> None:
    """SentencePiece as tokenizer.json alone, with added tokens, as transformers saves it."""
    _sentencepiece_model(path, prefixed, [])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    (path / "tokenizer.model").unlink()
    pieces = [processor.IdToPiece(i) for i in range(processor.vocab_size())][: TOY_VOCAB - 3]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda p: -processor.GetScore(ids[p]))
        for cut in range(1, len(piece))
        if not piece.startswith("<") and piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(path / "tokenizer.json"))


def _phi3(path: Path) -> None:
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    roles = [AddedToken(text, rstrip=True, normalized=False) for text in ("</s>", "<|user|>", "<|end|>")]
    _sentencepiece_json(path, True, spaces, None, ["<unk>", "<s>", *roles, "<|endoftext|>"])


def _gemma_json(path: Path) -> None:
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    specials: list[str | AddedToken] = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
    _sentencepiece_json(path, False, normalizers.Replace(" ", "▁"), split, specials)


def _mistral(path: Path) -> None:
    metaspace = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    _sentencepiece_json(path, True, None, metaspace, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])


_MAKERS: dict[str, Callable[[Path], None]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "smollm": _smollm,
    "llama3": _llama3,
    "qwen2": _qwen2,
    "tekken": _tekken,
    "phi4": _phi4,
    "qwen35": _qwen35,
    "gpt4o": _gpt4o,
    "deepseek3": _deepseek3,
    "deepseek_coder": _deepseek_coder,
    "falcon": _falcon,
    "llama": _llama,
    "gemma": _gemma,
    "phi3": _phi3,
    "gemma_json": _gemma_json,
    "mistral": _mistral,
}
FAMILIES = tuple(_MAKERS)


def write_vocabulary(metadata: Mapping[str, object], path: Path) -> Path:
    """A GGUF file with this metadata and no tensors; llama.cpp loads its vocabulary."""
    with path.open("wb") as file:
        GGUFWriter({**ARCHITECTURE, **metadata}, []).write(file, [])
    return path


def save_toy_tokenizer(family: str, folder: Path) -> None:
    """Write a tokenizer of at most TOY_VOCAB tokens into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _MAKERS[family](folder)
