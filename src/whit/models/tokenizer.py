"""Text to token ids and back, for every model that can be opened.

A tokenizer.json is used as it is. Everything else (a GGUF file, a SentencePiece model, GPT-2's pair of files) is
first seen as GGUF metadata and built from there, so that a text is cut as llama.cpp cuts it. The `tokenizers` library
does the work: no code of a model is run, and nothing depends on transformers knowing the architecture. transformers
only renders chat templates, in its sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers.utils.chat_template_utils import render_jinja_template

from whit.errors import BrokenFileError, ModelError
from whit.models.model import Model
from whit.models.pretokenizers import splitter_named
from whit.models.vocabulary import (
    KNOWN_ENDS,
    PREFIX,
    SPACE,
    SPECIALS,
    Kind,
    chat_template,
    gguf_vocabulary,
    special_texts,
)

# Ids that llama.cpp takes where a file names none.
_USUAL_IDS = {"gpt2": {"bos": 11, "eos": 11}, "llama": {"bos": 1, "eos": 2}}

# llama.cpp drops white space after the special tokens of files with such a name, but for some tokens.
_STRIPPING_NAMES, _NOT_STRIPPING = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")

CONTEXT = 8  # tokens before a text that may change how its first one is written
INCOMPLETE = "\ufffd"  # what decoding makes of a part of a character


class Tokenizer:
    """Encodes and decodes; makes no difference between where it came from.

    backend         the tokenizer that does the work
    template        chat template in Jinja, if the model has one
    special_tokens  texts of bos_token, eos_token, ... for the template
    """

    def __init__(
        self, backend: Backend, template: str | None = None, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self._backend = backend
        self._template = template
        self._special_tokens = dict(special_tokens or {})
        backend.no_truncation()
        backend.no_padding()

    @property
    def has_template(self) -> bool:
        """Whether the model says how a conversation is written down."""
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids. Special tokens written in the text are recognised; none are added unless `add_special`."""
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._backend.decode(list(ids)))

    def ends(self) -> set[int]:
        """Ids of tokens that end an answer: the model's own, and those that llama.cpp knows by their texts."""
        known = KNOWN_ENDS | {self._special_tokens.get("eos_token")}
        added = self._backend.get_added_tokens_decoder().items()
        return {number for number, token in added if str(token.content) in known}

    def writer(self, before: Sequence[int] = ()) -> Writer:
        """For the text of token ids that come one at a time after `before`."""
        return Writer(self, before)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Messages as the text that the model answers to, special tokens written out; None without a template.

        messages  {"role": "user", "content": "..."}, in order
        Raises ModelError when the template refuses them.
        """
        if self._template is None:
            return None
        try:
            texts, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._template,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except TemplateError as error:
            raise ModelError(f"the model's chat template does not take these messages: {error}") from error
        return str(texts[0])

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into an existing folder."""
        self._backend.save(str(folder / "tokenizer.json"))


class Writer:
    """Token ids as text, piece by piece: a character may be spread over several tokens, and a token alone may lack
    the space that it has after others."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._decode, self._ids = tokenizer.decode, list(before[-CONTEXT:])
        self._start, self._said = (
            0,
            len(self._ids),
        )  # ids before `_said` have been written; from `_start` on they matter

    def add(self, token: int) -> str:
        """What can be written now that this token is known; may be empty."""
        self._ids.append(token)
        piece = self._new()
        if not piece or piece.endswith(INCOMPLETE):
            return ""
        self._start, self._said = self._said, len(self._ids)
        return piece

    def rest(self) -> str:
        """What is left at the end: characters that were never completed."""
        return self._new()

    def _new(self) -> str:
        return self._decode(self._ids[self._start :])[len(self._decode(self._ids[self._start : self._said])) :]


def load_tokenizer(model: Model) -> Tokenizer:
    """The tokenizer of an opened model. Raises ModelError when there is none or its kind is not known."""
    folder = model.tokenizer_dir
    if folder is None:
        return _from_metadata(model.gguf_metadata, model.label)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _from_metadata(gguf_vocabulary(folder, model.config), model.label)
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise BrokenFileError(f"{path}: cannot be read as a tokenizer ({error}).") from error
    return Tokenizer(backend, chat_template(folder), special_texts(folder))


def save_tokenizer(model: Model, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into an existing folder, special tokens and template included.

    Raises ModelError as `load_tokenizer` does.
    """
    load_tokenizer(model).save(folder)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **_special_texts(model.gguf_metadata)}
    if template := model.gguf_metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _from_metadata(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    kind, tokens = metadata.get(PREFIX + "model"), metadata.get(PREFIX + "tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise ModelError(
            f"{where}: has no tokenizer that can be read (kind {kind!r}; known: 'gpt2' for byte-level BPE, 'llama' for "
            "SentencePiece). Give the original model folder instead."
        )
    kinds = metadata.get(PREFIX + "token_type") or [Kind.NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise BrokenFileError(f"{where}: has {len(tokens)} tokens but {len(kinds)} token types. Download it again.")
    backend = _byte_level(metadata, tokens, where) if kind == "gpt2" else _sentencepiece(metadata, tokens, kinds, where)
    by_kind: dict[int, list[str]] = {}
    for text, number in zip(tokens, kinds, strict=True):
        by_kind.setdefault(number, []).append(text)
    special = by_kind.get(Kind.CONTROL, []) + by_kind.get(Kind.UNKNOWN, [])
    strips = any(name in str(metadata.get("general.name", "")).lower() for name in _STRIPPING_NAMES)

    def added(text: str) -> AddedToken:
        return AddedToken(text, normalized=False, rstrip=strips and text not in _NOT_STRIPPING)

    backend.add_special_tokens([added(text) for text in special])
    backend.add_tokens([added(text) for text in by_kind.get(Kind.USER_DEFINED, [])])
    _frame(backend, metadata, tokens, where)
    return Tokenizer(backend, metadata.get("tokenizer.chat_template"), _special_texts(metadata))


def _special_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    tokens = metadata.get(PREFIX + "tokens", [])
    ids = {name: metadata.get(f"{PREFIX}{key}_token_id") for name, key in SPECIALS.items()}
    return {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}


def _frame(backend: Backend, metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> None:
    """Put the tokens around a text that llama.cpp puts there: as the file says, else as is usual for its kind."""
    kind = metadata[PREFIX + "model"]
    usual = {
        "bos": kind == "llama" or splitter_named(metadata.get(PREFIX + "pre", "default"), where).adds_bos,
        "eos": False,
    }
    around = []
    for key in ("bos", "eos"):
        number = metadata.get(f"{PREFIX}{key}_token_id", _USUAL_IDS[kind][key])
        adds = metadata.get(f"{PREFIX}add_{key}_token", usual[key])
        around.append(tokens[number] if adds and number < len(tokens) else None)
    first, last = around
    if first is None and last is None:
        return
    backend.post_processor = processors.TemplateProcessing(
        single=[*([first] if first else []), "$A", *([last] if last else [])],
        special_tokens=[(text, backend.token_to_id(text)) for text in dict.fromkeys(around) if text is not None],
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Backend:
    splitter = splitter_named(metadata.get(PREFIX + "pre", "default"), where)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get(PREFIX + "merges", [])]
    try:
        model = BPE(_ids(tokens), merges, ignore_merges=splitter.whole_words_first)
    except Exception as error:  # the library raises nothing more specific
        raise BrokenFileError(f"{where}: its merges do not fit its tokens ({error}). Download it again.") from error
    backend = Backend(model)
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in splitter.regexes]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], where: str) -> Backend:
    scores = metadata.get(PREFIX + "scores") or []
    if len(scores) != len(tokens):
        raise BrokenFileError(f"{where}: has {len(tokens)} tokens but {len(scores)} scores. Download it again.")
    ids = _ids(tokens)
    unknown = next((text for text, kind in zip(tokens, kinds, strict=True) if kind == Kind.UNKNOWN), None)
    # A pair may be joined when its result is a token; the best score first. Ties: the earlier token.
    ranked = sorted((i for i, kind in enumerate(kinds) if kind == Kind.NORMAL), key=lambda i: (-scores[i], i))
    merges = [
        (tokens[i][:cut], tokens[i][cut:])
        for i in ranked
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in ids and tokens[i][cut:] in ids
    ]
    prefixed = metadata.get(PREFIX + "add_space_prefix", True)
    backend = Backend(BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend(SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    spaces = decoders.Replace(SPACE, " ")
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    """First id of each text; a text that stands twice is encoded as its first token."""
    ids: dict[str, int] = {}
    for i, text in enumerate(tokens):
        ids.setdefault(text, i)
    return ids
