"""A release: one pass for statistics, then every variant written, verified and measured, then the card.

    .DIR.releasing/run           what must be the same for going on, as for a single file (pipeline/state.py)
                   text          the calibration text in tokens; some of it may have been sampled for minutes
                   statistics/   second moments of the original model (pipeline/statistics.py)
                   records.json  what is known of finished variants

A variant is finished when its record is there, says that it passed, and its files have the checksums in it. Whatever is
not is made again:
everything is deterministic, so that a release that was stopped anywhere ends with the same bytes as one that was not.
What stands in the card beside speeds is so, too. The folder beside the release goes when that is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from whit.checkpoints.atomic import synced_folder
from whit.checkpoints.checked import read_checked, write_checked
from whit.checkpoints.imatrix import write_imatrix
from whit.errors import BrokenFileError, CheckFailedError, OutputError, WhitError
from whit.evaluation.verdict import BROKEN, FAILED
from whit.memory import run_bytes
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.afterwards import Intended
from whit.pipeline.damage import decoded
from whit.pipeline.effort import Calibration
from whit.pipeline.folder import write_model
from whit.pipeline.quantize import Progress, model_view, plan_gguf
from whit.pipeline.state import fingerprint
from whit.pipeline.statistics import Statistics
from whit.pipeline.verify import Original, Verified, looked_at
from whit.recipes.named import recipe_named
from whit.release.record import Record, checksums, read_records, write_records
from whit.release.speed import machine, tokens_per_second
from whit.release.variants import Variant
from whit.shape import shape_from_config

CONTEXT = 4096  # tokens, for memory; or what the model reads
RUN, TEXT, STATISTICS, RECORDS = "run", "text", "statistics", "records.json"
RELEASE = "release.json"
Bar = Callable[[str], AbstractContextManager[Progress]]  # shows how far one piece of work is


@dataclass(frozen=True)
class Order:
    """What is wanted.

    out        the folder of the release
    asked      of the calibration, in words: what has other words is another release
    text       makes the calibration text and its effort, when they are needed
    held_out   [n, length] int64, the windows to measure on
    speed      whether GGUF files are run
    """

    model: Model
    variants: Sequence[Variant]
    out: Path
    asked: str
    text: Callable[[], Calibration]
    effort: Calibration
    held_out: Tensor
    speed: bool


@dataclass(frozen=True)
class Outcome:
    """A variant that is there.

    record  what is known of it
    faults  what is wrong with it
    kept    whether it was there before
    """

    record: Record
    faults: tuple[str, ...] = ()
    kept: bool = False

    @property
    def failed(self) -> bool:
        """Whether it must not be published."""
        return self.record.word in FAILED


class Job:
    """A release that is being made.

    path         where unfinished work lies
    fingerprint  of the model and the request
    source       what the calibration text is, empty when nothing needed one
    """

    def __init__(self, order: Order, bar: Bar) -> None:
        """Look at what is there already. bar: shows progress.

        Raises OutputError when there is another release or something else in the folder, or unfinished work of another
        request beside it; BrokenFileError when that is damaged.
        """
        self._order, self._bar = order, bar
        self.path = order.out.with_name(f".{order.out.name}.releasing")
        self.fingerprint = fingerprint(order.model, (), replace(order.effort, windows=order.held_out))
        self.fingerprint["text to measure on"] = self.fingerprint.pop("text")
        self.fingerprint["calibration text"] = order.asked
        self.fingerprint.pop("recipe")
        self.source = ""
        self._text: Calibration | None = None
        self._read: Original | None = None
        self._records = self._known()

    def outcome(self, variant: Variant) -> Outcome:
        """Make a variant, or find it. Raises what the writers raise, CheckFailedError when it cannot even be run."""
        record = self._records.get(variant.file)
        finished = record is not None and record.digest == digest(variant) and record.holds(self._order.out)
        if record is not None and finished and record.word not in FAILED:
            return Outcome(record, kept=True)
        self._begin()
        path, intended = self._order.out / variant.file, Intended()
        calibration = self._calibration() if any(step.needs_moments for step in variant.plan.steps) else None
        with self._bar(f"quantizing {variant.file}") as progress:
            result = write_model(self._order.model, variant.recipe, path, True, progress, calibration, intended)
        with self._bar(f"verifying {variant.file}") as progress:
            found, faults = self._verified(path, intended, progress)
        speed = None
        if self._order.speed and variant.is_gguf and not faults:
            try:
                speed = tokens_per_second(path)
            except BrokenFileError as error:
                faults = (str(error),)
        if found.result is None:
            raise CheckFailedError(f"{path}: {found.verdict.word}, {found.verdict.why}. Nothing is published.")
        word = BROKEN if faults and found.verdict.passed else found.verdict.word
        record = Record(
            name=variant.name,
            file=variant.file,
            recipe=variant.recipe.name,
            digest=digest(variant),
            kind=variant.recipe.layout,
            n_bytes=result.n_bytes,
            bits_per_weight=result.bits_per_weight,
            ram=run_bytes(result.n_bytes, shape_from_config(self._order.model.config), self.context).total,
            context=self.context,
            word=word,
            near=found.verdict.near,
            result=found.result,
            speed=speed,
            machine="" if speed is None else machine(),
            checksums=checksums(self._order.out, path),
        )
        self._records[variant.file] = record
        write_records(list(self._records.values()), self.path / RECORDS, {"fingerprint": self.fingerprint})
        return Outcome(record, faults or found.faults)

    @property
    def context(self) -> int:
        """Tokens of context that the memory is for."""
        metadata = self._order.variants[0].plan.metadata
        return min(CONTEXT, int(metadata.get(f"{metadata.get('general.architecture')}.context_length", CONTEXT)))

    def write_importance(self, path: Path) -> bool:
        """The importance matrix of the statistics, as llama.cpp reads it; False when nothing needed any."""
        if not any(step.needs_moments for variant in self._order.variants for step in variant.plan.steps):
            return False
        if path.exists():
            return True  # of the same model and text: nothing else has a place in this folder
        from whit.pipeline.observe import importance_of  # it imports transformers, which takes seconds

        calibration, model = self._calibration(), self._order.model
        assert calibration.statistics is not None
        view, source = model_view(model), calibration.source
        matrix = importance_of(model, view, calibration.statistics, calibration.windows, source)
        write_imatrix(matrix, path, overwrite=True)
        return True

    def finish(self) -> None:
        """The release is whole: nothing unfinished is left."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _known(self) -> dict[str, Record]:
        """Records of this request. Those of a finished release count when nothing unfinished lies beside it."""
        out = self._order.out
        if (self.path / RUN).exists():
            theirs, _ = read_checked(self.path / RUN)
            self._compare(theirs, f"{self.path} holds the unfinished work of a release", "that folder")
            if (self.path / TEXT).exists():
                self.source = read_checked(self.path / TEXT)[0]["source"]
            path = self.path / RECORDS
            return {each.file: each for each in read_records(path)[0]} if path.exists() else {}
        if (out / RELEASE).is_file():
            records, said = read_records(out / RELEASE)
            self.source = str(said.get("calibration", ""))
            self._compare(dict(said.get("fingerprint", {})), f"{out} holds a release", "that folder")
            return {each.file: each for each in records}
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out}: exists already and is no release. Choose another folder.")
        return {}

    def _compare(self, theirs: Mapping[str, str], what: str, where: str) -> None:
        other = [name for name, value in self.fingerprint.items() if theirs.get(name) != value]
        if other:
            raise OutputError(
                f"{what} with another {', '.join(other)}. Repeat the command that it is of to go on there, choose "
                f"another folder, or delete {where} to begin anew."
            )

    def _begin(self) -> None:
        """The folders, before anything is put there."""
        try:
            self.path.mkdir(exist_ok=True)
            if not (self.path / RUN).exists():  # what a finished release knows of its variants comes first
                write_records(list(self._records.values()), self.path / RECORDS, {"fingerprint": self.fingerprint})
                write_checked(self.path / RUN, self.fingerprint)
            self._order.out.mkdir(exist_ok=True)
            synced_folder(self.path.parent)
        except OSError as error:
            raise OutputError(f"{self._order.out}: cannot be written ({error.strerror or error}).") from error

    def _calibration(self) -> Calibration:
        """Text, effort and complete statistics; made when they are first needed."""
        if self._text is not None:
            return self._text
        self._begin()
        path = self.path / TEXT
        if path.exists():
            said, tensors = read_checked(path)
            found = replace(self._order.effort, windows=tensors["windows"], source=said["source"])
        else:
            found = self._order.text()
            write_checked(path, {"source": found.source}, {"windows": found.windows})
        statistics = Statistics(self.path / STATISTICS)
        if not statistics.complete:
            from whit.pipeline.observe import gather_statistics  # it imports transformers, which takes seconds

            model = self._order.model
            steps = plan_gguf(model, recipe_named("f32")).steps
            with self._bar("statistics") as progress:
                gather_statistics(model, model_view(model), steps, found.windows, statistics, progress, found.device)
        self._text, self.source = replace(found, statistics=statistics), found.source
        return self._text

    def _verified(self, path: Path, intended: Intended, progress: Progress) -> tuple[Verified, tuple[str, ...]]:
        """What `whit verify` finds, and what is not as it was meant to be written."""
        order = self._order
        self._read = self._read or Original(order.model, order.held_out, device=order.effort.device)
        found = looked_at(path, self._read, progress).verified
        try:
            wrong = intended.differing(decoded(open_model(path)).model)
        except WhitError as error:
            return found, (str(error),)
        if wrong:
            return found, (f"{len(wrong)} tensors are not what was to be written, the first is {wrong[0]}",)
        return found, ()


def digest(variant: Variant) -> str:
    """Of what a variant is: its layout and what every tensor becomes by which rounding."""
    steps = [(step.tensor.name, step.type, step.rounding) for step in variant.plan.steps]
    content = [variant.recipe.layout, variant.recipe.activations, *steps]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
