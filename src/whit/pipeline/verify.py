"""The verdict on a written file: is it what it should be, what was lost, and who is to blame?

Five looks, from the cheapest on. The file's labels (lint.py). Its values, read by two decoders that share nothing.
Every tensor beside the original's. The predictions of the whole, as `whit eval` measures them, and what is written
greedily. And the tensors that look worst, put into the original one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from whit.checkpoints.second import check_header
from whit.devices import CPU
from whit.errors import BadWeightsError, BrokenFileError
from whit.evaluation.compare import FinalStates, final_states, token_measures
from whit.evaluation.continuations import Continuations, compared, greedy
from whit.evaluation.diagnosis import Damage
from whit.evaluation.divergence import Comparison, TokenMeasures, summarize
from whit.evaluation.verdict import Verdict, verdict
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.damage import Decoded, Scan, decoded, scan
from whit.pipeline.lint import LLAMA, VLLM, Finding, lint
from whit.pipeline.quantize import Progress, model_view
from whit.pipeline.spotcheck import changed

PROMPTS, PROMPT, WRITTEN = 4, 32, 24  # continued greedily: how many, of how many tokens, by how many
BLAMED = 5  # tensors that are tried one at a time, on
TRIED = 256  # tokens of one window
LOOKED_AT = 0.003  # relative error from which a quantized tensor may be to blame


@dataclass(frozen=True)
class Culprit:
    """A tensor that looks worse than others.

    type    its grid
    damage  beside the original
    kl      mean divergence in nats of the original with this tensor alone, None when it was not tried
    """

    name: str
    type: str
    damage: Damage
    kl: float | None = None


@dataclass(frozen=True)
class Verified:
    """Everything that was found.

    result         of the whole, None when the file could not be run
    continuations  greedy ones beside the original's, None without
    faults         what is wrong, one clause each; the verdict follows the first
    culprits       most damaging first
    findings       of the linter, without those for runtimes of another kind of file
    n_tensors      looked at, of which `alone` had one decoder
    """

    verdict: Verdict
    result: Comparison | None = None
    continuations: Continuations | None = None
    faults: tuple[str, ...] = ()
    culprits: tuple[Culprit, ...] = ()
    findings: tuple[Finding, ...] = ()
    n_tensors: int = 0
    alone: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Looked:
    """A verdict, and what it was made from; None where the file could not be read or run so far.

    scan    tensor by tensor
    tokens  of every scored position
    said    [prompts, written] int64   greedy continuations of the original's prompts
    """

    verified: Verified
    scan: Scan | None = None
    tokens: TokenMeasures | None = None
    said: Tensor | None = None


class Original:
    """The model that files were made from. It is read when that is first needed; files that follow share the result.

    windows  [n, length] int64, of its tokenizer: what is measured on
    prompts  [prompts, tokens] int64: beginnings of windows, continued greedily
    """

    def __init__(self, model: Model, windows: Tensor, written: int = WRITTEN, device: torch.device = CPU) -> None:
        """written  tokens that every prompt is continued by
        device   where this and the files' models run as a whole
        """
        self.model, self.windows, self.device = model, windows, device
        self.prompts = windows[:PROMPTS, : min(PROMPT, windows.shape[1] // 2)]
        self._written = written
        self._read: tuple[FinalStates, Tensor] | None = None

    def read(self, progress: Progress) -> tuple[FinalStates, Tensor]:
        """What is left of it when it has read the windows, and its own continuations [prompts, written] int64."""
        if self._read is None:
            self._read = self.read_by(self.model, progress)
        return self._read

    def read_by(self, model: Model, progress: Progress) -> tuple[FinalStates, Tensor]:
        """The same of another model. Raises as `final_states` does."""
        said: list[Tensor] = []

        def write(module: nn.Module) -> None:
            said.append(greedy(module, self.prompts, self._written))

        return final_states(model, self.windows, progress, write, self.device), said[0]


def verify(
    path: Path, original: Model, windows: Tensor, progress: Progress | None = None, device: torch.device = CPU
) -> Verified:
    """Look at a file or folder in every way there is.

    windows  [n, length] int64, of the original's tokenizer
    device   where both models run as a whole
    Raises ModelError when the original cannot be used or the file is another model, TextError as `compare` does. A file
    that cannot be read or run is no error but a verdict.
    """
    return looked_at(path, Original(original, windows, device=device), progress).verified


def looked_at(path: Path, original: Original, progress: Progress | None = None) -> Looked:
    """`verify`, with what was found on the way."""
    started, tell = time.perf_counter(), progress or (lambda done, total, what: None)
    model_view(original.model)  # whatever is wrong with it is no fault of the file
    try:
        findings = tuple(of_its_kind(path, lint(path)))
        written = open_model(path)
        if written.gguf_tensors is not None:
            check_header(written.gguf_tensors)
        second = decoded(written)
        looked = scan(written, second, original.model, _part(tell, 0, 30))
    except (BrokenFileError, BadWeightsError) as error:
        return Looked(Verified(verdict(None, (), str(error)), seconds=time.perf_counter() - started))
    faults = (*_of_labels(findings), *_of_decoders(looked.disagree, len(looked.damages)), *_of_tensors(looked))
    result, tokens, said, continuations, unreadable = None, None, None, None, ""
    try:
        tokens, said, continuations = _measured(second.model, original, _part(tell, 30, 80))
        result = summarize(tokens)
    except BadWeightsError as error:
        unreadable = str(error)
    culprits = _culprits(looked, second, original, _part(tell, 80, 100))
    verified = Verified(
        verdict(result, faults, unreadable),
        result,
        continuations,
        faults,
        culprits,
        findings,
        len(looked.damages),
        len(second.alone),
        time.perf_counter() - started,
    )
    return Looked(verified, looked, tokens, said)


def of_its_kind(path: Path, findings: Sequence[Finding]) -> list[Finding]:
    """Findings without those that say that a runtime reads another kind of file."""
    other = LLAMA if path.is_dir() else VLLM
    return [each for each in findings if set(each.runtimes) != {other}]


def _of_labels(findings: Sequence[Finding]) -> list[str]:
    """Labels that make every runtime stop, or compute something else. A format of one's own is none."""
    return [each.what for each in findings if each.stops and len(each.runtimes) > 1 and "own format" not in each.what]


def _of_decoders(disagree: Mapping[str, float], n_tensors: int) -> list[str]:
    if not disagree:
        return []
    worst = max(disagree, key=lambda name: disagree[name])
    return [
        f"two decoders read different values in {len(disagree)} of {n_tensors} tensors, most of all in {worst} "
        f"({disagree[worst]:.1%} of its size)"
    ]


def _of_tensors(looked: Scan) -> list[str]:
    """One line per tensor, or per block when most of its matrices have the same fault."""
    faulty = {name: each.fault for name, each in looked.damages.items() if each.fault}
    lines = []
    for name, fault in faulty.items():
        block = name.split(".")[1] if name.startswith("blk.") else ""
        alike = [other for other in faulty if other.startswith(f"blk.{block}.") and faulty[other] == fault]
        if block and len(alike) > 3:
            if name == alike[0]:
                names = ", ".join(other.split(".")[2] for other in alike)
                lines.append(f"block {block} ({names}): {fault}")
        else:
            lines.append(f"{name}: {fault}")
    return lines


def _measured(candidate: Model, original: Original, tell: Progress) -> tuple[TokenMeasures, Tensor, Continuations]:
    n = len(original.windows)
    reference, expected = original.read(lambda done, _, what: tell(done, 3 * n, what))
    states, said = original.read_by(candidate, lambda done, _, what: tell(n + done, 3 * n, what))
    tokens = token_measures(states, reference, original.windows, lambda done, _, what: tell(2 * n + done, 3 * n, what))
    return tokens, said, compared(said, expected)


def _culprits(looked: Scan, second: Decoded, original: Original, tell: Progress) -> tuple[Culprit, ...]:
    """The tensors with faults, then those with the largest errors for their types, tried one at a time."""
    suspects = [name for name, each in looked.damages.items() if each.fault]
    sound = {name: each for name, each in looked.damages.items() if not each.fault and each.expected > 0}
    rest = [name for name, each in sound.items() if each.error > LOOKED_AT]
    suspects += sorted(rest, key=lambda name: -looked.damages[name].ratio)
    values = {tensor.name: tensor for tensor in second.view.tensors}
    tried = [name for name in suspects[:BLAMED] if torch.isfinite(values[name].read()).all()]
    changes = [(name, lambda W, name=name: looked.frame.undo(name, values[name].read())) for name in tried]
    window = original.windows[:1, :TRIED]
    measured = changed(original.model, changes, window, tell, window.shape[1] // 2, original.device)
    kls = dict(zip(tried, measured, strict=True))
    found = [Culprit(name, looked.types[name], looked.damages[name], kls.get(name)) for name in suspects[:BLAMED]]
    return tuple(sorted(found, key=lambda each: -(each.kl if each.kl is not None else float("inf"))))


def _part(tell: Progress, first: int, last: int) -> Progress:
    """A progress that runs from one percentage to another."""

    def report(done: int, total: int, what: str) -> None:
        tell(first + round((last - first) * done / max(1, total)), 100, what)

    return report
