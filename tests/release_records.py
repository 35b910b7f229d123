"""Records by hand."""

from __future__ import annotations

from whit.evaluation.divergence import Comparison
from whit.evaluation.verdict import word_of
from whit.release.record import Record


def comparison(kl: float) -> Comparison:
    return Comparison(kl, kl / 10, kl, kl, kl, kl, 16.0, 0.1, 15.9, 0.1, 1.01, 0.01, 0.01, 0.001, 0.9, 0.01, 510)


def record(file: str, n_bytes: int, kl: float, kind: str = "gguf", ram: float = 0.0, word: str = "") -> Record:
    return Record(
        name=file,
        file=file,
        recipe="q4_0",
        digest="d",
        kind=kind,
        n_bytes=n_bytes,
        bits_per_weight=4.5,
        ram=ram or 2.0 * n_bytes,
        context=512,
        word=word or word_of(kl),
        near="",
        result=comparison(kl),
        speed=None,
        machine="",
        checksums={file: "00"},
    )
