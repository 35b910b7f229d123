"""Reports made by hand: every figure is chosen, nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from whit.evaluation.diagnosis import Damage
from whit.evaluation.divergence import TokenMeasures, summarize
from whit.evaluation.verdict import verdict
from whit.pipeline.verify import Culprit, Verified
from whit.report.facts import Coverage, FileFacts, Matrix, Prompt, Report, Said, Seen

N_TOKENS = 400


def tokens(kl: float, seed: int = 0, spread: float = 0.3) -> TokenMeasures:
    """Divergences around a mean."""
    noise = torch.randn(N_TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = kl * (1 + spread * (noise - noise.mean())).clamp_min(0.01)
    same = torch.arange(N_TOKENS) % 10 > 0
    nll = torch.ones(N_TOKENS, dtype=torch.float64)
    return TokenMeasures(values, nll * 2, nll * 2, same)


def matrix(role: str, block: int | None = 0, error: float = 0.1, expected: float = 0.1, **changes: Any) -> Matrix:
    name = role if block is None else f"blk.{block}.{role}"
    return Matrix(
        name, block, role, **{"type": "q4_0", "bits": 4.5, "n_weights": 1024, **changes}, error=error, expected=expected
    )


def matrices(n_layers: int = 3) -> tuple[Matrix, ...]:
    inside = [matrix(role, block) for block in range(n_layers) for role in ("attn_q", "ffn_up", "ffn_down")]
    return (matrix("token_embd", None, 0.01, 0.01, type="q8_0", bits=8.5), *inside)


def file(
    name: str,
    n_bytes: int,
    kl: float | None,
    faults: Sequence[str] = (),
    culprit_kl: float = 0.0,
    seed: int = 0,
    **changes: Any,
) -> FileFacts:
    """kl  mean divergence, None for a file that cannot be read"""
    if kl is None:
        return FileFacts(name, "file", n_bytes, None, Verified(verdict(None, (), "it is truncated")))
    measured = tokens(kl, seed)
    result = summarize(measured)
    culprits = (Culprit("blk.1.ffn_down.weight", "q4_0", Damage(0.1, 0.1), culprit_kl),)
    verified = Verified(verdict(result, faults), result, faults=tuple(faults), culprits=culprits)
    said = (Said("The sky is ", "green & <b>bold</b>.", 4, 10), Said("All of it.", "", 10, 10))
    given = {"origin": "Whit", "matrices": matrices(), "tokens": measured, "said": said, **changes}
    return FileFacts(name, "GGUF", n_bytes, 8 * n_bytes / 1e8, verified, **given)


def coverage(tokens_of_experts: tuple[int, ...] = (5, 0, 3, 8)) -> Coverage:
    seen = (
        Seen("blk.0.attn_q.weight", (512,), 0.0),
        Seen("blk.0.ffn_up_exps.weight", tokens_of_experts, 0.25),
        Seen("blk.0.ffn_down_exps.weight", tokens_of_experts, 0.0),
    )
    return Coverage("imp.gguf", ("a text",), 512, seen, ("output.weight",), ())


def report(*files: FileFacts, coverage: Coverage | None = None) -> Report:
    prompts = (Prompt("Why is", "The sky is blue."), Prompt("How much", "All of it."))
    return Report("model", 200_000_000, 16.0, "a text", 4, 512, files, prompts, coverage, "0.1.0")
