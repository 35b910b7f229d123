"""Text to token ids and back, for every model that can be opened.

A tokenizer.json is used as it is. Everything else (a GGUF file, a SentencePiece model, GPT-2's pair of files) is
first seen as GGUF metadata and built from there, so that a text is cut as llama.cpp cuts it. Only the `tokenizers`
library is used: no code of a model is run, and nothing depends on transformers knowing the architecture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from whit.errors import BrokenFileError, ModelError
from whit.models.model import Model
from whit.models.pretokenizers import pretokenizer_regexes
from whit.models.vocabulary import PREFIX, SPACE, Kind, gguf_vocabulary


class Tokenizer:
    """Encodes and decodes; makes no difference between where it came from."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()

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

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into an existing folder."""
        self._backend.save(str(folder / "tokenizer.json"))


def load_tokenizer(model: Model) -> Tokenizer:
    """The tokenizer of an opened model. Raises ModelError when there is none or its kind is not known."""
    if model.tokenizer_dir is not None and (model.tokenizer_dir / "tokenizer.json").is_file():
        path = model.tokenizer_dir / "tokenizer.json"
        try:
            return Tokenizer(Backend.from_file(str(path)))
        except Exception as error:  # the library raises nothing more specific
            raise BrokenFileError(f"{path}: cannot be read as a tokenizer ({error}).") from error
    if model.tokenizer_dir is not None:
        return Tokenizer(_from_metadata(gguf_vocabulary(model.tokenizer_dir, model.config), model.label))
    return Tokenizer(_from_metadata(model.gguf_metadata, model.label))


def save_tokenizer(model: Model, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into an existing folder, special tokens and template included.

    Raises ModelError as `load_tokenizer` does.
    """
    load_tokenizer(model).save(folder)
    metadata = model.gguf_metadata
    tokens = metadata.get(PREFIX + "tokens", [])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        number = metadata.get(f"{PREFIX}{key}_token_id")
        if number is not None and number < len(tokens):
            settings[name] = tokens[number]
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _from_metadata(metadata: Mapping[str, Any], where: str) -> Backend:
    kind, tokens = metadata.get(PREFIX + "model"), metadata.get(PREFIX + "tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise ModelError(
            f"{where}: has no tokenizer that can be read (kind {kind!r}; known: 'gpt2' for byte-level BPE, 'llama' for "
            "SentencePiece). Give the original model folder instead."
        )
    kinds = [Kind(k) for k in metadata.get(PREFIX + "token_type", [Kind.NORMAL] * len(tokens))]
    backend = _byte_level(metadata, tokens, where) if kind == "gpt2" else _sentencepiece(metadata, tokens, kinds)
    for text, token_kind in zip(tokens, kinds, strict=True):
        if token_kind is Kind.CONTROL:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif token_kind is Kind.USER_DEFINED:
            backend.add_tokens([AddedToken(text, normalized=False)])
    return backend


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Backend:
    regexes, whole_words_first = pretokenizer_regexes(metadata.get(PREFIX + "pre", "default"), where)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get(PREFIX + "merges", [])]
    backend = Backend(BPE(_ids(tokens), merges, ignore_merges=whole_words_first))
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[Kind]) -> Backend:
    ids, scores = _ids(tokens), metadata[PREFIX + "scores"]
    unknown = next((text for text, kind in zip(tokens, kinds, strict=True) if kind is Kind.UNKNOWN), None)
    # A pair may be joined when its result is a token; the best score first. Ties: the earlier token.
    ranked = sorted((i for i, kind in enumerate(kinds) if kind is Kind.NORMAL), key=lambda i: (-scores[i], i))
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
