from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from toy_tokenizers import save_toy_tokenizer
from whit.errors import BrokenFileError
from whit.models.sentencepiece import BPE, SentencePieceModel, read_sentencepiece

BYTE, CONTROL, UNKNOWN, USER_DEFINED = 6, 3, 2, 4


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    save_toy_tokenizer("gemma", folder)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def read(gemma: Path) -> SentencePieceModel:
    return read_sentencepiece(gemma)


@pytest.fixture(scope="module")
def processor(gemma: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(gemma))


def test_tokens_and_scores_are_those_of_the_library(
    read: SentencePieceModel, processor: SentencePieceProcessor
) -> None:
    ids = range(processor.vocab_size())
    assert [piece.text for piece in read.pieces] == [processor.IdToPiece(i) for i in ids]
    assert [piece.score for piece in read.pieces] == [processor.GetScore(i) for i in ids]


def test_types_are_those_of_the_library(read: SentencePieceModel, processor: SentencePieceProcessor) -> None:
    for i, piece in enumerate(read.pieces):
        asked = (processor.IsUnknown(i), processor.IsControl(i), processor.IsByte(i))
        assert asked == (piece.kind == UNKNOWN, piece.kind == CONTROL, piece.kind == BYTE)


def test_user_defined_tokens_are_told_apart(read: SentencePieceModel) -> None:
    assert [p.text for p in read.pieces if p.kind == USER_DEFINED] == ["<start_of_turn>", "<end_of_turn>"]


def test_special_ids_are_those_of_the_library(read: SentencePieceModel, processor: SentencePieceProcessor) -> None:
    assert read.special == {"unknown": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    assert processor.pad_id() == -1


@pytest.mark.parametrize(("family", "adds_space"), [("llama", True), ("gemma", False)])
def test_the_space_before_a_text_is_found(family: str, adds_space: bool, tmp_path: Path) -> None:
    save_toy_tokenizer(family, tmp_path)
    model = read_sentencepiece(tmp_path / "tokenizer.model")
    assert (model.adds_space, model.algorithm) == (adds_space, BPE)


def test_a_truncated_file_is_named(gemma: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.model"
    cut.write_bytes(gemma.read_bytes()[:1000])
    with pytest.raises(BrokenFileError, match="cut.model"):
        read_sentencepiece(cut)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.model"
    path.write_bytes(content)
    with suppress(BrokenFileError):
        assert read_sentencepiece(path).pieces
