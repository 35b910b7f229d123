"""What follows from a report's figures, in sentences.

Every sentence is there because a figure says so, and names it. Differences between files are those of the same
tokens, so that they are known better than either file's own loss; what is less than two standard errors is called no
difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from whit.evaluation.divergence import mean_and_error
from whit.evaluation.verdict import EXCELLENT, GOOD, USABLE
from whit.report.facts import Coverage, FileFacts, Matrix, Report, by_size

GGUF = "GGUF"  # a kind of file
CLEAR = 2.0  # standard errors
STANDS_OUT = 0.2  # share of a file's loss that one tensor makes
WORSE = 1.25  # times the error of the rest: a kind of matrices that stands out
PLAIN = 0.01  # error beside plain rounding's, from 1, that is taken for plain rounding itself
QUANTIZED = 0.003  # relative error of a matrix that is not just stored in another float type
RARE = 12.0  # times the mean: a loss of one token in a hundred that a mean does not show
FAULTS = 2  # named per file


@dataclass(frozen=True)
class Advice:
    """Sentences under one heading."""

    topic: str
    sentences: tuple[str, ...]


def advice(report: Report) -> tuple[Advice, ...]:
    """All of it; headings with nothing to say are left out."""
    named = [
        ("Which file to take", choice(report.files)),
        ("What is to blame", blame(report.files)),
        ("What to try next", following(report)),
    ]
    found = [(topic, tuple(sentences)) for topic, sentences in named]
    return tuple(Advice(topic, sentences) for topic, sentences in found if sentences)


def beaten(files: Sequence[FileFacts]) -> dict[str, FileFacts]:
    """Files beside which another is no larger and loses clearly less: by name, with the best of those others.

    GGUF files and folders are for other runtimes, and are not held against each other.
    """
    found = {}
    for each in files:
        alike = [other for other in files if other is not each and (other.kind == GGUF) == (each.kind == GGUF)]
        better = [other for other in alike if other.n_bytes <= each.n_bytes and _less(other, each)]
        if better:
            found[each.name] = min(better, key=loss)
    return found


def loss(file: FileFacts) -> float:
    """Mean divergence from the original, nats per token; infinite without one."""
    result = file.verified.result
    return math.inf if result is None or math.isnan(result.kl_mean) else result.kl_mean


def size(n_bytes: int) -> str:
    """Decimal kilobytes, megabytes or gigabytes."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.0f} kB"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.2f} GB"


def choice(files: Sequence[FileFacts]) -> Iterator[str]:
    """The file to take, what more and less bytes would do, and which are not worth their bytes."""
    sound = [each for each in files if each.verified.verdict.passed and each.tokens is not None]
    words = {each.name: each.verified.verdict.word for each in files}
    if not sound:
        found = ", ".join(f"{name} is {word}" for name, word in words.items())
        yield f"None of these: {found}."
        return
    fit = [each for each in sound if words[each.name] in (EXCELLENT, GOOD)]
    taken = min(fit, key=lambda each: (each.n_bytes, loss(each))) if fit else min(sound, key=loss)
    if fit:
        others = len(fit) - 1
        reason = (
            f"the smallest of the {len(fit)} that are {GOOD} or better"
            if others
            else f"the one that is {words[taken.name]}"
        )
    else:
        reason = f"no file here is {GOOD}, and this one loses least"
    if len(files) == 1:
        reason = f"it is {words[taken.name]}"
    yield f"Take {taken.name} ({_figures(taken)}): {reason}."
    larger = [each for each in sound if _less(each, taken) and each.n_bytes > taken.n_bytes]
    if larger:
        best = min(larger, key=loss)
        yield (
            f"Where {size(best.n_bytes - taken.n_bytes)} more do not matter, {best.name} loses "
            f"{_times(loss(taken), loss(best))} ({_figures(best)})."
        )
    smaller = [each for each in sound if each.n_bytes < taken.n_bytes and words[each.name] == USABLE]
    if smaller:
        best = min(smaller, key=loss)
        yield (
            f"Where that is too large, {best.name} saves {size(taken.n_bytes - best.n_bytes)} and loses "
            f"{_times(loss(best), loss(taken), more=True)}; it is {USABLE} ({_figures(best)})."
        )
    for name, better in beaten(sound).items():
        each = next(file for file in sound if file.name == name)
        difference, error = _between(each, better)
        gain = "is no larger" if better.n_bytes == each.n_bytes else f"is {size(each.n_bytes - better.n_bytes)} smaller"
        yield f"{name} is not worth its bytes: {better.name} {gain} and loses {difference:.3g} ± {error:.1g} nats less."
    for first, second in _alike(sound):
        difference, error = _between(first, second)
        yield (
            f"{first.name} and {second.name} cannot be told apart on this text ({difference:+.2g} ± {error:.1g} nats); "
            f"{_smaller(first, second)}"
        )


def blame(files: Sequence[FileFacts]) -> Iterator[str]:
    """What makes each file that is not excellent lose what it loses."""
    for each in files:
        verified = each.verified
        if verified.verdict.word == EXCELLENT:
            continue
        for fault in verified.faults[:FAULTS]:
            yield f"{each.name} has a fault: {fault}."
        if len(verified.faults) > FAULTS:
            yield f"{each.name} has {len(verified.faults) - FAULTS} more faults."
        if verified.result is None:
            why = verified.verdict.why.removeprefix(f"{each.name}: ").rstrip(".")
            yield f"{each.name} was not measured: {why}."
            continue
        yield from _tensors(each)
        role = worst_role(each.matrices)
        if role is not None:
            name, error, rest, types = role
            yield f"In {each.name} {name} ({types}) is {error:.1%} off the original's, everything else {rest:.1%}."


def following(report: Report) -> Iterator[str]:
    """Commands, and the figure that calls for each."""
    for each in report.files:
        verdict, result = each.verified.verdict, each.verified.result
        if each.verified.faults or result is None:
            yield f"Write {each.name} again from {report.original}, and look at it with whit verify."
            continue
        if verdict.near:
            yield (
                f"{each.name} is {verdict.word}, but {verdict.near} lies within two standard errors: measure on more "
                f"text (--windows {4 * report.n_windows})."
            )
        if result.kl_p99 > RARE * result.kl_mean > 0:
            yield (
                f"{each.name} loses little on average, but one token in a hundred {result.kl_p99:.2g} nats or more: "
                "measure on a text of your own use (--text)."
            )
        if verdict.word != EXCELLENT:
            yield from _better(each)
    if plain := [each.name for each in report.files if _plainly_rounded(each)]:
        yield (
            f"The matrices of {' and '.join(plain)} are as far off as plain rounding leaves them. At the same size, "
            "rounding on a text loses less as a rule (whit quantize without --rounding nearest), and an existing file "
            "can have better scales (whit distil)."
        )
    if report.coverage is not None:
        yield from coverage_gaps(report.coverage)


def coverage_gaps(coverage: Coverage) -> Iterator[str]:
    """What an importance matrix does not know."""
    unseen = [(seen.name, sum(n == 0 for n in seen.tokens)) for seen in coverage.seen if 0 in seen.tokens]
    if unseen:
        n, name = sum(n for _, n in unseen), max(unseen, key=lambda each: each[1])[0]
        yield (
            f"{coverage.name} knows nothing of {n} experts' matrices, most of all in {name}: no token reached them. "
            "Make it from more text, or from more kinds of text (whit imatrix --calib, --windows)."
        )
    if coverage.missing:
        yield (
            f"{coverage.name} has no entry for {len(coverage.missing)} matrices of the model, such as "
            f"{coverage.missing[0]}: they are rounded without one."
        )
    if coverage.unknown:
        yield (
            f"{coverage.name} has {len(coverage.unknown)} entries that are no matrices of this model, such as "
            f"{coverage.unknown[0]}: is it another model's?"
        )


def worst_role(matrices: Sequence[Matrix]) -> tuple[str, float, float, str] | None:
    """The kind of matrices with the largest relative error, where it stands out.

    Returns its name, its error, that of all others, both by root mean square, and its types.
    """
    lossy = [each for each in matrices if each.error > QUANTIZED and math.isfinite(each.error)]
    roles = dict.fromkeys(each.role for each in lossy)
    if len(roles) < 2:
        return None
    errors = {role: _rms([each for each in lossy if each.role == role]) for role in roles}
    worst = max(errors, key=lambda role: errors[role])
    rest = _rms([each for each in lossy if each.role != worst])
    if errors[worst] < WORSE * rest:
        return None
    kinds = ", ".join(dict.fromkeys(each.type for each in lossy if each.role == worst))
    return worst, errors[worst], rest, kinds


def beside_plain(matrices: Sequence[Matrix]) -> float | None:
    """The median error in units of plain rounding's; None where no matrix is quantized on a grid that is known."""
    ratios = [each.error / each.expected for each in matrices if each.expected > QUANTIZED]
    return statistics.median(ratios) if ratios else None


def _plainly_rounded(file: FileFacts) -> bool:
    """Whether it loses something by plain rounding, and by that alone."""
    ratio, verdict = beside_plain(file.matrices), file.verified.verdict
    measured = file.verified.result is not None and not file.verified.faults
    return measured and verdict.word != EXCELLENT and ratio is not None and abs(ratio - 1) < PLAIN


def _better(file: FileFacts) -> Iterator[str]:
    ratio = beside_plain(file.matrices)
    if ratio is not None and ratio >= 1 + PLAIN:
        yield (
            f"The matrices of {file.name} are {ratio:.2f} times as far off as plain rounding leaves them, as error "
            "feedback on a text does: what is left to gain at this size is training (whit tune)."
        )
    elif ratio is not None and ratio <= 1 - PLAIN:
        yield (
            f"The matrices of {file.name} are {ratio:.2f} times as far off as plain rounding leaves them: their scales "
            "were searched. Error feedback on a text (whit quantize without --rounding) or training (whit tune) may "
            "still gain something at this size."
        )
    role = worst_role(file.matrices)
    if role is not None and file.kind == GGUF:
        pattern = (
            f"blk.*.{role[0]}"
            if any(each.role == role[0] and each.block is not None for each in file.matrices)
            else role[0]
        )
        yield f"With a few more bytes than {file.name} has, give {role[0]} more bits: --keep '{pattern}=q8_0'."


def _tensors(file: FileFacts) -> Iterator[str]:
    """Of those tried alone."""
    tried = [each for each in file.verified.culprits if each.kl is not None]
    if not tried:
        return
    worst, whole = max(tried, key=lambda each: each.kl or 0.0), loss(file)
    cost, name = worst.kl or 0.0, worst.name.removesuffix(".weight")
    if cost > STANDS_OUT * whole:
        yield (
            f"In {file.name} one tensor stands out: {name} ({worst.type}), alone in the original, costs {cost:.2g} "
            f"nats; the whole file loses {whole:.2g}."
        )
    else:
        yield (
            f"In {file.name} no single tensor is to blame: of the {len(tried)} that look worst for their type, {name} "
            f"costs most when it is changed alone, {cost:.2g} of the {whole:.2g} nats that the file loses."
        )


def _less(first: FileFacts, second: FileFacts) -> bool:
    """Whether the first loses clearly less."""
    if first.tokens is None or second.tokens is None:
        return first.tokens is not None
    difference, error = _between(second, first)
    return difference > CLEAR * error


def _between(first: FileFacts, second: FileFacts) -> tuple[float, float]:
    """How much more the first loses, nats per token, and the standard error of that, over the same tokens."""
    if first.tokens is None or second.tokens is None:
        raise ValueError("both files have to be measured")
    return mean_and_error(first.tokens.kl - second.tokens.kl)


def _alike(files: Sequence[FileFacts]) -> Iterator[tuple[FileFacts, FileFacts]]:
    """Neighbours in size of which neither loses clearly less."""
    for first, second in pairwise(by_size(files)):
        if not _less(first, second) and not _less(second, first):
            yield first, second


def _smaller(first: FileFacts, second: FileFacts) -> str:
    if first.n_bytes == second.n_bytes:
        return "they are of one size as well."
    return f"take the smaller, {min(first, second, key=lambda each: each.n_bytes).name}."


def _rms(matrices: Sequence[Matrix]) -> float:
    weights = sum(each.n_weights for each in matrices)
    return math.sqrt(sum(each.error**2 * each.n_weights for each in matrices) / weights)


def _figures(file: FileFacts) -> str:
    result = file.verified.result
    same = "" if result is None else f", same top token {result.same_top:.1%}"
    return f"{size(file.n_bytes)}, {loss(file):.3g} nats{same}"


def _times(large: float, small: float, more: bool = False) -> str:
    word = "more" if more else "less"
    if small <= 0:
        return "nothing at all" if not more else "something where the other loses nothing"
    times = large / small
    return f"{f'{times:.2g}' if times < 100 else f'{times:.0f}'} times {'as much' if more else word}"
