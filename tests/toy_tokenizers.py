"""Small tokenizers, trained on Python's own documentation, cut as the real ones of each family cut."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from whit.models.pretokenizers import LLAMA3, QWEN2, TEKKEN

TOY_VOCAB = 512
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


def _llama3(path: Path) -> None:
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    _byte_level(path, [split], False, specials, bos="<|begin_of_text|>", whole_words_first=True)


def _qwen2(path: Path) -> None:
    split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    _byte_level(path, [split], False, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], nfc=True)


def _tekken(path: Path) -> None:
    split = pre_tokenizers.Split(Regex(TEKKEN), "isolated")
    _byte_level(path, [split], False, ["<unk>", "<s>", "</s>"], bos="<s>", whole_words_first=True)


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


def _phi3(path: Path) -> None:
    """SentencePiece as tokenizer.json alone, with added tokens, as transformers saves it."""
    (path / "part").mkdir()
    _sentencepiece_model(path / "part", True, [])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path / "part" / "tokenizer.model"))
    pieces = [processor.IdToPiece(i) for i in range(processor.vocab_size())][: TOY_VOCAB - 3]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda p: -processor.GetScore(ids[p]))
        for cut in range(1, len(piece))
        if not piece.startswith("<") and piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "part" / "tokenizer.model").unlink()
    (path / "part").rmdir()


_MAKERS: dict[str, Callable[[Path], None]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "smollm": _smollm,
    "llama3": _llama3,
    "qwen2": _qwen2,
    "tekken": _tekken,
    "llama": _llama,
    "gemma": _gemma,
    "phi3": _phi3,
}
FAMILIES = tuple(_MAKERS)


def save_toy_tokenizer(family: str, folder: Path) -> None:
    """Write a tokenizer of at most TOY_VOCAB tokens into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _MAKERS[family](folder)
