"""What a release says of itself, when all of its variants are there: recipes, pictures, figures, card, checksums."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from whit.calibration.text import Text
from whit.checkpoints.atomic import whole_file
from whit.errors import MissingPackageError, ModelError, OutputError
from whit.evaluation.frontier import Point, draw
from whit.models.model import Model
from whit.models.tokenizer import load_tokenizer
from whit.recipes.files import write_recipe
from whit.release.card import front_matter, render, row
from whit.release.choice import choices
from whit.release.job import RELEASE, Job
from whit.release.origin import Origin
from whit.release.record import Record, checksums, write_records
from whit.release.speed import TIMES, TOKENS
from whit.release.variants import Variant

CARD, SUMS, RECIPES = "README.md", "SHA256SUMS", "recipes"
LLAMA, GPU = "GGUF", "for GPUs"


@dataclass(frozen=True)
class Said:
    """What the card says beside the figures.

    measured_on  the text, of which `windows` windows of `length` tokens were read
    options      of the command that makes the release again, but for model, folder and variants
    """

    origin: Origin
    measured_on: Text
    windows: int
    length: int
    preset: str
    options: Sequence[str]


def write_pages(
    job: Job, model: Model, out: Path, variants: Sequence[Variant], records: Sequence[Record], said: Said
) -> list[str]:
    """Write everything beside the variants into the release `out`, the card and the checksums last.

    records  of the variants, in the same order
    Returns what was left out and what else lies there, a sentence each. Raises OutputError.
    """
    remarks = []
    recipes = _write_recipes(out, variants)
    importance = f"{said.origin.name}.imatrix.gguf"
    importance = importance if job.write_importance(out / importance) else ""
    points = [
        Point(LLAMA if each.is_gguf else GPU, each.file, each.n_bytes, each.bits_per_weight, each.result)
        for each in records
    ]
    pictures: list[str] = []
    try:
        pictures = [path.name for path in draw(points, f"{said.origin.name}: what is lost at which size", out)]
    except MissingPackageError as error:
        remarks.append(f"No picture of size and loss: {error}")
    write_records(
        records,
        out / RELEASE,
        {"fingerprint": job.fingerprint, "calibration": job.source, "whit": version("whit")},
    )
    _write(out / CARD, _card(job, model, variants, records, said, bool(pictures), importance))
    mine = [CARD, RELEASE, *recipes, *pictures, *([importance] if importance else [])]
    sums = {path: value for each in records for path, value in each.checksums.items()}
    for name in mine:
        sums |= checksums(out, out / name)
    _write(out / SUMS, "".join(f"{sums[path]}  {path}\n" for path in sorted(sums)))
    others = sorted(
        each.relative_to(out).as_posix()
        for each in out.rglob("*")
        if each.is_file() and each.relative_to(out).as_posix() not in {*sums, SUMS}
    )
    return [*remarks, *(f"{name} is no part of this release." for name in others)]


def prompt_template(model: Model) -> str | None:
    """How the model wants to be asked, with {system_prompt} and {prompt} to be filled in; None when it does not say."""
    tokenizer = load_tokenizer(model)
    user = {"role": "user", "content": "{prompt}"}
    for messages in ([{"role": "system", "content": "{system_prompt}"}, user], [user]):
        try:
            return tokenizer.chat(messages)
        except ModelError:  # some templates take no system prompt
            continue
    return None


def _write_recipes(out: Path, variants: Sequence[Variant]) -> list[str]:
    try:
        (out / RECIPES).mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out / RECIPES}: cannot be made ({error.strerror or error}).") from error
    names = [f"{RECIPES}/{_stem(variant.file)}.json" for variant in variants]
    for variant, name in zip(variants, names, strict=True):
        write_recipe(variant.recipe, out / name)
    return names


def _card(
    job: Job,
    model: Model,
    variants: Sequence[Variant],
    records: Sequence[Record],
    said: Said,
    pictures: bool,
    importance: str,
) -> str:
    chosen, prompt = choices(records), prompt_template(model)
    machines = list(dict.fromkeys(each.machine for each in records if each.machine))
    first = next((each for each in records if chosen[each.file].recommended), records[0])
    folder = next((each for each in records if not each.is_gguf and chosen[each.file].recommended), None)
    examples = [f"whit run {first.file} 'Why is the sky blue?'", f"llama-cli -m {first.file}"] if first.is_gguf else []
    examples += [f"vllm serve ./{folder.file}"] if folder is not None else []
    source = said.origin.base or said.origin.label
    recipe = f"{RECIPES}/{_stem(records[0].file)}.json"
    again = ["whit", "release", source, "-o", "again", "--variants", recipe, *said.options]
    return render(
        {
            "front_matter": front_matter(said.origin, records, prompt is not None),
            "origin": said.origin,
            "whit": version("whit"),
            "torch": job.fingerprint["version of torch"],
            "rows": [row(each, chosen[each.file]) for each in records],
            "context": f"{job.context:,}",
            "measured": f"{said.windows} windows of {said.length} tokens ({said.measured_on.description}), the second "
            f"half of each scored, {records[0].result.tokens:,} tokens in all, in float32",
            "machine": "; ".join(machines),
            "tokens": TOKENS,
            "times": TIMES,
            "notes": [note for variant in variants for note in _notes(variant)],
            "pictures": pictures,
            "examples": examples,
            "prompt": prompt or "",
            "digest": job.fingerprint["model"],
            "calibration": job.source,
            "preset": said.preset,
            "again": shlex.join(again),
            "importance": importance,
        }
    )


def _notes(variant: Variant) -> list[str]:
    """Where a name promises more than the shapes of the model allow."""
    matrices = [step for step in variant.plan.steps if not step.tensor.keep_float]
    reasons = Counter(step.exception for step in matrices if step.exception)
    types = {step.type for step in matrices if step.exception}
    if not reasons:
        return []
    n, why = sum(reasons.values()), reasons.most_common(1)[0][0]
    return [f"{variant.file}: {n} of {len(matrices)} matrices are {' or '.join(sorted(types))} instead: {why}."]


def _stem(file: str) -> str:
    return file.removesuffix(".gguf")


def _write(path: Path, text: str) -> None:
    raw = text.encode()
    with whole_file(path, len(raw), overwrite=True) as file:
        file.write(raw)
