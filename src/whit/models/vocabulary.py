"""From a tokenizer folder to the tokenizer.* metadata of a GGUF file.

Two kinds cover the architectures that are known: byte-level BPE ("gpt2": tokens and merges) and SentencePiece BPE
("llama": tokens and scores). The files are read as they are; transformers is not needed and not imported.
Source: the GGUF specification, tokenizer section; the tokenizer.json format of the `tokenizers` package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from whit.checkpoints.folder import read_json
from whit.errors import BrokenFileError, ModelError
from whit.models.pretokenizers import pretokenizer_name

PREFIX = "tokenizer.ggml."
SPACE = "▁"  # how SentencePiece writes a space
UNUSED_SCORE = -10000.0
SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Kind(IntEnum):
    """Token types of GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class _Vocabulary:
    """Tokens by id while they are collected; `extra` holds final keys, `special` ids that no other file may name."""

    model: str
    tokens: dict[int, tuple[str, Kind, float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    adds_bos: bool = False
    adds_eos: bool = False


def gguf_vocabulary(tokenizer_dir: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.* metadata for a model folder, as plain Python values.

    tokenizer_dir  folder with tokenizer.json, tokenizer.model, or vocab.json and merges.txt
    config         config.json; `vocab_size` rows are filled, unused ones with placeholders
    Raises ModelError when there is no tokenizer, one that llama.cpp cannot express, or more tokens than rows;
    BrokenFileError for unreadable files.
    """
    settings = _optional(tokenizer_dir / "tokenizer_config.json")
    vocabulary = _read(tokenizer_dir, settings)
    _add_from_settings(vocabulary, settings)
    n_rows = config.get("vocab_size") or 1 + max(vocabulary.tokens)
    if max(vocabulary.tokens) >= n_rows:
        raise ModelError(
            f"{tokenizer_dir}: the tokenizer has ids up to {max(vocabulary.tokens)} but the model has only {n_rows} "
            "rows of embeddings. Tokenizer and model do not belong together."
        )
    for unused in range(n_rows):
        vocabulary.tokens.setdefault(unused, (f"[PAD{unused}]", Kind.UNUSED, UNUSED_SCORE))
    rows = [vocabulary.tokens[i] for i in range(n_rows)]
    metadata = {
        "model": vocabulary.model,
        **vocabulary.extra,
        "tokens": [text for text, _, _ in rows],
        "token_type": [int(kind) for _, kind, _ in rows],
        **({"scores": [score for _, _, score in rows]} if vocabulary.model == "llama" else {}),
        **_special_ids(vocabulary, tokenizer_dir, settings, config),
        "add_bos_token": bool(settings.get("add_bos_token", vocabulary.adds_bos)),
        "add_eos_token": bool(settings.get("add_eos_token", vocabulary.adds_eos)),
    }
    template = _chat_template(tokenizer_dir, settings)
    keyed = {PREFIX + key: value for key, value in metadata.items()}
    return keyed | ({"tokenizer.chat_template": template} if template else {})


def no_vocabulary() -> dict[str, Any]:
    """What a file without a tokenizer says; llama.cpp loads it, but only token ids go in and out."""
    return {PREFIX + "model": "none"}


def _read(folder: Path, settings: Mapping[str, Any]) -> _Vocabulary:
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json(folder / "tokenizer.json")
        model = tokenizer.get("model") or {}
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise ModelError(f"{folder}: has a {model.get('type')} tokenizer; only BPE is known.")
        if model.get("byte_fallback"):
            # tokenizer.model has the trained scores where it exists
            if (folder / "tokenizer.model").is_file():
                vocabulary = _sentencepiece(folder / "tokenizer.model")
                _add_tokens(vocabulary, tokenizer.get("added_tokens", []))
                _frame(vocabulary, tokenizer.get("post_processor"))
                return vocabulary
            return _sentencepiece_from_json(tokenizer)
        return _byte_level(tokenizer, str(folder / "tokenizer.json"))
    if (folder / "tokenizer.model").is_file():
        return _sentencepiece(folder / "tokenizer.model")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _legacy(folder, settings)
    raise ModelError(
        f"{folder}: has no tokenizer (looked for tokenizer.json, tokenizer.model, vocab.json with merges.txt). "
        "Save the model's tokenizer into the folder."
    )


def _byte_level(tokenizer: Mapping[str, Any], where: str) -> _Vocabulary:
    vocabulary = _Vocabulary("gpt2")
    vocabulary.tokens = {i: (text, Kind.NORMAL, 0.0) for text, i in tokenizer["model"]["vocab"].items()}
    _add_tokens(vocabulary, tokenizer.get("added_tokens", []))
    vocabulary.extra = {"pre": pretokenizer_name(tokenizer, where), "merges": _merges(tokenizer["model"]["merges"])}
    _frame(vocabulary, tokenizer.get("post_processor"))
    return vocabulary


def _legacy(folder: Path, settings: Mapping[str, Any]) -> _Vocabulary:
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    vocabulary = _Vocabulary("gpt2", extra={"pre": "gpt-2", "merges": merges})
    vocabulary.tokens = {i: (text, Kind.NORMAL, 0.0) for text, i in read_json(folder / "vocab.json").items()}
    named = {_text(settings.get(name)) for name in SPECIALS} | {"<|endoftext|>"}
    for i, (text, _, score) in vocabulary.tokens.items():
        if text in named:
            vocabulary.tokens[i] = (text, Kind.CONTROL, score)
    return vocabulary


def _sentencepiece(path: Path) -> _Vocabulary:
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise BrokenFileError(f"{path}: is not a SentencePiece model. Download it again.") from error
    vocabulary = _Vocabulary("llama", adds_bos=True)
    for i in range(processor.vocab_size()):
        kind = (
            Kind.UNKNOWN if processor.IsUnknown(i)
            else Kind.CONTROL if processor.IsControl(i)
            else Kind.UNUSED if processor.IsUnused(i)
            else Kind.BYTE if processor.IsByte(i)
            else Kind.NORMAL
        )  # fmt: skip
        vocabulary.tokens[i] = (processor.IdToPiece(i), kind, processor.GetScore(i))
    # "a" becomes "▁a" exactly when the model puts a space before a text
    prefixed = any(piece.startswith(SPACE) for piece in processor.encode("a", out_type=str)[:1])
    vocabulary.extra = {"pre": "default", "add_space_prefix": prefixed}
    own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unknown": processor.unk_id()}
    vocabulary.special = {key: i for key, i in own.items() if i >= 0}
    return vocabulary


def _sentencepiece_from_json(tokenizer: Mapping[str, Any]) -> _Vocabulary:
    model = tokenizer["model"]
    # llama.cpp joins the pair whose result has the best score; merges are listed best first
    rank: dict[str, int] = {}
    for merge in _merges(model["merges"]):
        rank.setdefault(merge.replace(" ", "", 1), len(rank))
    vocabulary = _Vocabulary("llama", extra={"pre": "default", "add_space_prefix": _adds_space(tokenizer)})
    for text, i in model["vocab"].items():
        kind = Kind.BYTE if _BYTE.fullmatch(text) else Kind.UNKNOWN if text == model.get("unk_token") else Kind.NORMAL
        vocabulary.tokens[i] = (text, kind, -float(rank.get(text, len(rank) + i)))
    _add_tokens(vocabulary, tokenizer.get("added_tokens", []))
    _frame(vocabulary, tokenizer.get("post_processor"))
    return vocabulary


def _merges(merges: Iterable[str | list[str]]) -> list[str]:
    """Merges as "left right"; newer files hold pairs. A space inside a part is written as SentencePiece does."""
    return [
        merge if isinstance(merge, str) else " ".join(part.replace(" ", SPACE) for part in merge) for merge in merges
    ]


def _add_tokens(vocabulary: _Vocabulary, added: Iterable[Mapping[str, Any]]) -> None:
    for token in added:
        text, special = token["content"], token.get("special", False)
        known = vocabulary.tokens.get(token["id"])
        if known is not None and known[1] is Kind.UNKNOWN:
            continue
        # a token that is matched as written has plain spaces, not SentencePiece's
        kind, text = (Kind.CONTROL, text) if special else (Kind.USER_DEFINED, text.replace(SPACE, " "))
        vocabulary.tokens[token["id"]] = (text, kind, known[2] if known else -1000.0)


def _add_from_settings(vocabulary: _Vocabulary, settings: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json knows."""
    listed = settings.get("added_tokens_decoder", {})
    _add_tokens(vocabulary, ({"id": int(i), **token} for i, token in listed.items()))


def _frame(vocabulary: _Vocabulary, processor: Mapping[str, Any] | None) -> None:
    """Whether tokens are put before and after a text, as the post-processor says."""
    kind = (processor or {}).get("type")
    if processor is None or kind in ("ByteLevel", None):
        return
    if kind == "Sequence":
        for child in processor["processors"]:
            _frame(vocabulary, child)
    elif kind == "TemplateProcessing":
        single = processor["single"]
        vocabulary.adds_bos = "SpecialToken" in single[0]
        vocabulary.adds_eos = "SpecialToken" in single[-1]
    elif kind in ("RobertaProcessing", "BertProcessing"):
        vocabulary.adds_bos = vocabulary.adds_eos = True


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    def flat(node: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
        if node is None:
            return []
        return [leaf for child in node.get(children, []) for leaf in flat(child, children)] or [node]

    normalizers = flat(tokenizer.get("normalizer"), "normalizers")
    splitters = flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    prepends = any(node["type"] == "Prepend" for node in normalizers)
    metaspace = [node for node in splitters if node["type"] == "Metaspace"]
    return prepends or any(
        node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never") != "never"
        for node in metaspace
    )


def _special_ids(
    vocabulary: _Vocabulary, folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, int]:
    by_text = {text: i for i, (text, _, _) in vocabulary.tokens.items()}
    mapped = _optional(folder / "special_tokens_map.json")
    generation = _optional(folder / "generation_config.json")
    ids = {}
    for name, key in SPECIALS.items():
        texts = [_text(source.get(name)) for source in (settings, mapped)]
        candidates: list[Any] = [by_text.get(text) for text in texts if text]
        for source in (config, generation):
            value = source.get(f"{name}_id")
            candidates.append(value[0] if isinstance(value, list) and value else value)
        candidates.append(vocabulary.special.get(key))
        chosen = next((i for i in candidates if isinstance(i, int) and i in vocabulary.tokens), None)
        if chosen is not None:
            ids[f"{key}_token_id"] = chosen
    return ids


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    return template


def _text(token: Any) -> str | None:
    """A special token is written as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
