"""From a tokenizer folder to the tokenizer.* metadata of a GGUF file.

Two kinds cover the architectures that are known: byte-level BPE ("gpt2": tokens and merges) and SentencePiece BPE
("llama": tokens and scores). The files are read as they are; transformers is not needed and not imported.
What llama.cpp cannot do is refused, with exceptions that only change unusual text: it never composes Unicode (NFC),
and where a space is put before a text it puts one after special tokens and before other spaces too. White space after
Phi-3's special tokens is dropped by files whose general.name contains "phi-3": no key of the file can say so.
Source: the GGUF specification, tokenizer section; the tokenizer.json format of the `tokenizers` package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from whit.checkpoints.folder import read_json
from whit.errors import BrokenFileError, ModelError
from whit.models.pretokenizers import pretokenizer_name, pretokenizer_steps
from whit.models.sentencepiece import BPE, read_sentencepiece

PREFIX = "tokenizer.ggml."
SPACE = "▁"  # how SentencePiece writes a space
UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0
SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Added tokens of this look steer the model although some files do not call them special (DeepSeek, Gemma).
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d+>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
# Normalizers that leave composed text alone, and those that only turn spaces into SentencePiece's.
_UNICODE = {"NFC", "NFKC", "Precompiled"}
_SPACING = {"Prepend ▁", "Replace ' ' by '▁'"}
_METASPACE = {(), ("Metaspace",), ("Split MergedWithPrevious  ",)}  # the last one finds no space left to split at
# Tokens that llama.cpp takes for the end of an answer without being told.
KNOWN_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<｜end▁of▁sentence｜>"),
    )
)


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
    """Tokens by id while they are collected.

    extra      final keys of this kind of vocabulary
    special    ids that the tokenizer itself names
    first      id of the token that is put before a text; last: after it; None when none is
    framed     whether the tokenizer itself decided about the two
    """

    model: str
    tokens: dict[int, tuple[str, Kind, float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    first: int | None = None
    last: int | None = None
    framed: bool = False


def gguf_vocabulary(tokenizer_dir: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.* metadata for a model folder, as plain Python values.

    tokenizer_dir  folder with tokenizer.json, tokenizer.model, or vocab.json and merges.txt
    config         config.json; `vocab_size` rows are filled, unused ones with placeholders
    Raises ModelError when there is no tokenizer, one that llama.cpp cannot express, or more tokens than rows;
    BrokenFileError for unreadable files.
    """
    settings = _optional(tokenizer_dir / "tokenizer_config.json")
    mapped = _optional(tokenizer_dir / "special_tokens_map.json")
    generation = _optional(tokenizer_dir / "generation_config.json")
    try:
        vocabulary = _read(tokenizer_dir, {**mapped, **settings})
        _add_tokens(vocabulary, _listed(settings))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise BrokenFileError(
            f"{tokenizer_dir}: the tokenizer's files have a part that is missing or of the wrong kind ({error!r}). "
            "Save or download the tokenizer again."
        ) from error
    rows = _rows(vocabulary, tokenizer_dir, config.get("vocab_size"))
    ids = _special_ids(vocabulary, (settings, mapped), (config, generation))
    metadata = {
        "model": vocabulary.model,
        **vocabulary.extra,
        "tokens": [text for text, _, _ in rows],
        "token_type": [int(kind) for _, kind, _ in rows],
        **({"scores": [score for _, _, score in rows]} if vocabulary.model == "llama" else {}),
        **ids,
        **_other_ends(vocabulary, ids, (generation, config)),
        "add_bos_token": _adds(vocabulary, vocabulary.first, settings.get("add_bos_token")),
        "add_eos_token": _adds(vocabulary, vocabulary.last, settings.get("add_eos_token")),
    }
    keyed = {PREFIX + key: value for key, value in metadata.items()}
    template = chat_template(tokenizer_dir)
    return keyed | ({"tokenizer.chat_template": template} if template else {})


def no_vocabulary() -> dict[str, Any]:
    """What a file without a tokenizer says; llama.cpp loads it, but only token ids go in and out."""
    return {PREFIX + "model": "none"}


def chat_template(folder: Path) -> str | None:
    """The chat template of a tokenizer folder, the default one of several; None if there is none.

    Raises BrokenFileError for unreadable files.
    """
    if (folder / "chat_template.jinja").is_file():
        return _text_of(folder / "chat_template.jinja")
    template = _optional(folder / "tokenizer_config.json").get("chat_template")
    if template is None:
        template = _optional(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    return template


def special_texts(folder: Path) -> dict[str, str]:
    """Texts of the special tokens by the names that tokenizer_config.json and special_tokens_map.json give them.

    Raises BrokenFileError for unreadable files.
    """
    sources = (_optional(folder / "special_tokens_map.json"), _optional(folder / "tokenizer_config.json"))
    found = {name: _content(source[name]) for source in sources for name in SPECIALS if source.get(name)}
    return {name: text for name, text in found.items() if text}


def _rows(vocabulary: _Vocabulary, folder: Path, vocab_size: int | None) -> list[tuple[str, Kind, float]]:
    if not vocabulary.tokens:
        raise BrokenFileError(f"{folder}: the tokenizer has no tokens. Save or download it again.")
    largest = max(vocabulary.tokens)
    n_rows = vocab_size or 1 + largest
    if largest >= n_rows:
        raise ModelError(
            f"{folder}: the tokenizer has ids up to {largest} but the model has only {n_rows} "
            "rows of embeddings. Tokenizer and model do not belong together."
        )
    unused = {i: (f"[PAD{i}]", Kind.UNUSED, UNUSED_SCORE) for i in range(n_rows)}
    rows = [vocabulary.tokens.get(i, unused[i]) for i in range(n_rows)]
    seen: dict[str, int] = {}
    for i, (text, _, _) in enumerate(rows):  # llama.cpp ends the process when a text stands twice
        if seen.setdefault(text, i) != i:
            raise ModelError(
                f"{folder}: tokens {seen[text]} and {i} are both {text!r}, which llama.cpp does not allow."
            )
    return rows


def _read(folder: Path, settings: Mapping[str, Any]) -> _Vocabulary:
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder)
    if (folder / "tokenizer.model").is_file():
        vocabulary = _sentencepiece(folder / "tokenizer.model")
        vocabulary.first = vocabulary.special.get("bos")  # usual where no other file says
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = _legacy(folder, settings)
    else:
        raise ModelError(
            f"{folder}: has no tokenizer (looked for tokenizer.json, tokenizer.model, vocab.json with merges.txt). "
            "Save the model's tokenizer into the folder."
        )
    added = _optional(folder / "added_tokens.json").items()
    _add_tokens(vocabulary, [{"id": i, "content": text} for text, i in added])
    return vocabulary


def _from_json(folder: Path) -> _Vocabulary:
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    model = tokenizer.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ModelError(f"{folder}: has a {model.get('type')} tokenizer; only BPE is known.")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ModelError(f"{path}: its BPE has {option} = {model[option]!r}, which llama.cpp does not know.")
    steps = pretokenizer_steps(tokenizer.get("pre_tokenizer"))
    metaspaced = model.get("byte_fallback") and not any(step.startswith("ByteLevel") for step in steps)
    normalizers = set(_normalizers(tokenizer.get("normalizer")))
    if strange := sorted(normalizers - _UNICODE - (_SPACING if metaspaced else set())):
        raise ModelError(f"{path}: changes text before splitting it ({', '.join(strange)}); llama.cpp cannot do that.")
    if not metaspaced:
        vocabulary = _byte_level(tokenizer, str(path))
    elif tuple(steps) not in _METASPACE:
        raise ModelError(f"{path}: splits text ({' then '.join(steps)}) where llama.cpp's SentencePiece does not.")
    elif (folder / "tokenizer.model").is_file():  # it has the trained scores
        vocabulary = _sentencepiece(folder / "tokenizer.model")
    else:
        vocabulary = _sentencepiece_from_json(tokenizer)
    if metaspaced:
        vocabulary.extra["add_space_prefix"] = "Prepend ▁" in normalizers or _prepends(tokenizer.get("pre_tokenizer"))
    _add_tokens(vocabulary, tokenizer.get("added_tokens", []))
    _frame(vocabulary, tokenizer.get("post_processor"))
    return vocabulary


def _byte_level(tokenizer: Mapping[str, Any], where: str) -> _Vocabulary:
    vocabulary = _Vocabulary("gpt2")
    vocabulary.tokens = {i: (text, Kind.NORMAL, 0.0) for text, i in tokenizer["model"]["vocab"].items()}
    merges = _merges(tokenizer["model"]["merges"])
    vocabulary.extra = {"pre": pretokenizer_name(tokenizer, where), "merges": merges, "add_space_prefix": False}
    return vocabulary


def _legacy(folder: Path, settings: Mapping[str, Any]) -> _Vocabulary:
    lines = _text_of(folder / "merges.txt").split("\n")
    merges = [line for line in (line.rstrip("\r") for line in lines) if line and not line.startswith("#version")]
    vocabulary = _Vocabulary("gpt2", extra={"pre": "gpt-2", "merges": merges, "add_space_prefix": False})
    vocabulary.tokens = {i: (text, Kind.NORMAL, 0.0) for text, i in read_json(folder / "vocab.json").items()}
    named = {_content(settings.get(name)) for name in SPECIALS} | {"<|endoftext|>"}
    for i, (text, _, score) in vocabulary.tokens.items():
        if text in named:
            vocabulary.tokens[i] = (text, Kind.CONTROL, score)
    return vocabulary


def _sentencepiece(path: Path) -> _Vocabulary:
    model = read_sentencepiece(path)
    if model.algorithm != BPE:
        raise ModelError(f"{path}: was not trained with BPE (algorithm {model.algorithm}); only BPE is known.")
    vocabulary = _Vocabulary("llama", extra={"pre": "default", "add_space_prefix": model.adds_space})
    for i, piece in enumerate(model.pieces):
        text = piece.text.replace(SPACE, " ") if piece.kind == Kind.USER_DEFINED else piece.text
        vocabulary.tokens[i] = (text, Kind(piece.kind), piece.score)
    vocabulary.special = model.special
    return vocabulary


def _sentencepiece_from_json(tokenizer: Mapping[str, Any]) -> _Vocabulary:
    model = tokenizer["model"]
    # llama.cpp joins the pair whose result has the best score; merges are listed best first
    rank: dict[str, int] = {}
    for merge in model["merges"]:
        rank.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), len(rank))
    vocabulary = _Vocabulary("llama", extra={"pre": "default"})
    for text, i in model["vocab"].items():
        kind = Kind.BYTE if _BYTE.fullmatch(text) else Kind.UNKNOWN if text == model.get("unk_token") else Kind.NORMAL
        vocabulary.tokens[i] = (text, kind, -float(rank.get(text, len(rank) + i)))
    return vocabulary


def _merges(merges: Iterable[str | list[str]]) -> list[str]:
    """Merges as "left right"; newer files hold pairs. A space inside a part is written as byte-level BPE does."""
    return [merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges]


def _listed(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens that only tokenizer_config.json knows."""
    return [{"id": int(i), **token} for i, token in settings.get("added_tokens_decoder", {}).items()]


def _add_tokens(vocabulary: _Vocabulary, added: Iterable[Mapping[str, Any]]) -> None:
    for token in added:
        text, known = token["content"], vocabulary.tokens.get(token["id"])
        if known is not None and known[1] is Kind.UNKNOWN:
            continue
        if token.get("special", False) or _LOOKS_SPECIAL.fullmatch(text):
            kind = Kind.CONTROL
        else:
            kind = Kind.USER_DEFINED
            if vocabulary.model == "llama":  # it is matched before spaces become SentencePiece's
                text = text.replace(SPACE, " ")
        vocabulary.tokens[token["id"]] = (text, kind, known[2] if known else ADDED_SCORE)


def _frame(vocabulary: _Vocabulary, processor: Mapping[str, Any] | None) -> None:
    """Which tokens are put before and after a text, as the post-processor says."""
    if processor is None:
        return
    vocabulary.framed = True
    kind = processor["type"]
    if kind == "Sequence":
        for child in processor["processors"]:
            _frame(vocabulary, child)
    elif kind == "TemplateProcessing":
        ids = {name: token["ids"][0] for name, token in processor["special_tokens"].items()}
        first, last = (processor["single"][end].get("SpecialToken") for end in (0, -1))
        vocabulary.first = ids[first["id"]] if first else None
        vocabulary.last = ids[last["id"]] if last else None
    elif kind in ("RobertaProcessing", "BertProcessing"):
        vocabulary.first, vocabulary.last = processor["cls"][1], processor["sep"][1]


def _adds(vocabulary: _Vocabulary, framing: int | None, setting: bool | None) -> bool:
    """A post-processor is what runs; without one the setting counts, then what is usual for this kind of file."""
    return framing is not None if vocabulary.framed or setting is None else bool(setting)


def _normalizers(node: Mapping[str, Any] | None) -> list[str]:
    if node is None:
        return []
    kind = node["type"]
    if kind == "Sequence":
        return [name for child in node["normalizers"] for name in _normalizers(child)]
    if kind == "Prepend":
        return [f"Prepend {node['prepend']}"]
    if kind == "Replace":
        pattern = node["pattern"]
        return [f"Replace {pattern.get('String', pattern.get('Regex'))!r} by {node['content']!r}"]
    return [kind]


def _prepends(node: Mapping[str, Any] | None) -> bool:
    if node is None or node["type"] != "Metaspace":
        return node is not None and any(_prepends(child) for child in node.get("pretokenizers", []))
    return node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never") != "never"


def _special_ids(
    vocabulary: _Vocabulary, texts: Iterable[Mapping[str, Any]], numbers: Iterable[Mapping[str, Any]]
) -> dict[str, int]:
    """The special ids. What is put around texts is certain; then come names, then numbers, then the tokenizer's own."""
    by_text = {text: i for i, (text, _, _) in vocabulary.tokens.items()}
    ids = {}
    for name, key in SPECIALS.items():
        candidates = [{"bos": vocabulary.first, "eos": vocabulary.last}.get(key)]
        candidates += [by_text.get(_content(source.get(name)) or "") for source in texts]
        candidates += [next(iter(_numbers(source.get(f"{name}_id"))), None) for source in numbers]
        candidates.append(vocabulary.special.get(key))
        chosen = next((i for i in candidates if i is not None and i in vocabulary.tokens), None)
        if chosen is not None:
            ids[f"{key}_token_id"] = chosen
    return ids


def _other_ends(
    vocabulary: _Vocabulary, ids: Mapping[str, int], sources: Iterable[Mapping[str, Any]]
) -> dict[str, int]:
    """Further tokens that end an answer, which llama.cpp would not know by their text. It has room for two."""
    ends = [i for source in sources for i in _numbers(source.get("eos_token_id"))]
    new = [i for i in dict.fromkeys(ends) if i in vocabulary.tokens and i != ids.get("eos_token_id")]
    new = [i for i in new if vocabulary.tokens[i][0] not in KNOWN_ENDS]
    return dict(zip(("eot_token_id", "eom_token_id"), new, strict=False))


def _numbers(value: Any) -> list[int]:
    """Token ids are written as one number or as a list."""
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _content(token: Any) -> str | None:
    """A special token is written as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenFileError(f"{path}: cannot be read as text ({error}).") from error
