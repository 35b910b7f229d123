"""What a SentencePiece model file says about its tokens.

The file is one protocol buffer message. The sentencepiece package encodes text with it but does not tell which tokens
are user-defined, nor how the model was trained, so the few fields that matter are read here.
Left out: the normalisation table; llama.cpp does not apply it and transformers' Llama tokenizer does not either.
Source: sentencepiece_model.proto, the protocol buffer wire format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from whit.errors import BrokenFileError

BPE = 2  # of TrainerSpec.model_type; 1 is unigram, the default
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NOT_SET = 2**64 - 1  # -1, "there is no such token"


@dataclass(frozen=True)
class Piece:
    """One token: its text, the score that decides which pair is joined first, and its type as GGUF numbers it."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """Tokens by id, the algorithm (BPE or another number), the space put before a text, ids by name if set."""

    pieces: tuple[Piece, ...]
    algorithm: int
    adds_space: bool
    special: dict[str, int]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model. Raises BrokenFileError when it is not one."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == _PIECES:
                pieces.append(_piece(dict(_fields(_bytes(value)))))
            elif number == _TRAINER:
                trainer = dict(_fields(_bytes(value)))
            elif number == _NORMALIZER:
                normalizer = dict(_fields(_bytes(value)))
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"{path}: is not a SentencePiece model ({error}). Download it again.") from error
    if not pieces:
        raise BrokenFileError(f"{path}: is not a SentencePiece model (no tokens). Download it again.")
    ids = {name: trainer.get(number, default) for name, (number, default) in _SPECIAL.items()}
    special = {name: i for name, i in ids.items() if isinstance(i, int) and i < len(pieces) and i != _NOT_SET}
    return SentencePieceModel(tuple(pieces), int(trainer.get(3, 1)), bool(normalizer.get(3, 1)), special)


# Field number and default of the ids that TrainerSpec names.
_SPECIAL = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, _NOT_SET)}


def _piece(fields: dict[int, int | bytes]) -> Piece:
    score = fields.get(2, b"\0\0\0\0")
    return Piece(_bytes(fields[1]).decode("utf-8"), struct.unpack("<f", _bytes(score))[0], int(fields.get(3, 1)))


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where text should")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one message, lengths checked before anything is cut out."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"unknown field type {wire} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes at byte {at} passes the end")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("ends in the middle of a number")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError(f"a number at byte {at} never ends")
