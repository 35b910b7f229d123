"""Advice follows from figures: each sentence appears with the figure that calls for it, and not without."""

from __future__ import annotations

from dataclasses import replace

import pytest

from facts import coverage, file, matrices, matrix, report, tokens
from whit.evaluation.divergence import summarize
from whit.evaluation.verdict import verdict
from whit.report.advice import advice, beaten, beside_plain, blame, choice, coverage_gaps, following, worst_role
from whit.report.facts import FileFacts

MB = 1_000_000


def test_the_smallest_good_file_is_taken() -> None:
    files = [file("big", 140 * MB, 0.002), file("good", 105 * MB, 0.05), file("small", 90 * MB, 0.4)]
    first, larger, smaller = choice(files)
    assert first.startswith("Take good (105.0 MB, 0.05 nats")
    assert "smallest of the 2 that are good or better" in first
    assert "35.0 MB more do not matter, big loses 25 times less" in larger
    assert "small saves 15.0 MB and loses 8 times as much; it is usable" in smaller


def test_another_order_of_losses_is_another_advice() -> None:
    files = [file("big", 140 * MB, 0.4), file("good", 105 * MB, 0.05), file("small", 90 * MB, 0.002)]
    first, *rest = choice(files)
    assert first.startswith("Take small (90.0 MB")
    assert [line.split(":")[0] for line in rest] == ["big is not worth its bytes", "good is not worth its bytes"]
    assert {name: better.name for name, better in beaten(files).items()} == {"big": "small", "good": "small"}


def test_where_none_is_good_the_closest_is_taken_and_where_none_passes_none() -> None:
    files = [file("a", 90 * MB, 0.4), file("b", 95 * MB, 0.2)]
    assert next(choice(files)).startswith("Take b (95.0 MB")
    assert "no file here is good" in next(choice(files))
    bad = [file("a", 90 * MB, 1.0), file("b", 95 * MB, 3.0), file("c", 10, None)]
    assert list(choice(bad)) == ["None of these: a is damaged, b is broken, c is broken."]


def test_a_file_with_a_fault_is_never_taken() -> None:
    files = [file("faulty", 90 * MB, 0.001, faults=["blk.0.attn_q: a scale is zero"]), file("sound", 140 * MB, 0.05)]
    assert next(choice(files)).startswith("Take sound")
    assert any("faulty has a fault: blk.0.attn_q: a scale is zero" in line for line in blame(files))
    assert any(line.startswith("Write faulty again from model") for line in following(report(*files)))


def test_what_two_standard_errors_do_not_tell_apart_is_no_difference() -> None:
    files = [file("a", 90 * MB, 0.05, seed=1), file("b", 95 * MB, 0.0501, seed=2)]
    assert not beaten(files)
    assert any("cannot be told apart on this text" in line and "take the smaller, a" in line for line in choice(files))
    # The same distance, but on the same tokens: then it is known.
    assert "b" in beaten([file("a", 90 * MB, 0.05, seed=1), file("b", 95 * MB, 0.0501, seed=1)])


def test_one_tensor_is_to_blame_or_none() -> None:
    assert any(
        "one tensor stands out: blk.1.ffn_down (q4_0)" in line for line in blame([file("a", MB, 0.3, culprit_kl=0.2)])
    )
    assert any("no single tensor is to blame" in line for line in blame([file("a", MB, 0.3, culprit_kl=0.01)]))
    assert not list(blame([file("a", MB, 0.005, culprit_kl=0.004)]))  # excellent


def test_a_kind_of_matrices_that_stands_out_is_named_with_its_error() -> None:
    assert worst_role(matrices()) is None
    skewed = [*matrices(), *(matrix("attn_v", k, 0.3, 0.3, type="q2_k") for k in range(3))]
    found = worst_role(skewed)
    assert found is not None
    role, error, rest, types = found
    assert (role, types) == ("attn_v", "q2_k")
    assert error == pytest.approx(0.3)
    assert rest == pytest.approx(((9 * 0.1**2 + 0.01**2) / 10) ** 0.5)
    lines = list(following(report(file("a", MB, 0.3, matrices=tuple(skewed)))))
    assert any("--keep 'blk.*.attn_v=q8_0'" in line for line in lines)


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(1.0, "plain rounding leaves them. At"), (1.3, "1.30 times as far off"), (0.9, "scales were searched")],
)
def test_the_next_step_depends_on_how_the_file_was_rounded(ratio: float, said: str) -> None:
    made = tuple(matrix("ffn_up", k, 0.1 * ratio, 0.1) for k in range(4))
    assert beside_plain(made) == pytest.approx(ratio)
    (line,) = following(report(file("a", MB, 0.3, matrices=made)))
    assert said in line


def test_rare_losses_and_open_verdicts_ask_for_another_measurement() -> None:
    measured = tokens(0.002)
    measured.kl[:8] = 0.8
    result = summarize(measured)
    assert result.kl_p99 > 12 * result.kl_mean
    rare = file("a", MB, 0.002)
    rare = replace(rare, verified=replace(rare.verified, result=result))
    assert any("one token in a hundred 0.8 nats or more" in line for line in following(report(rare)))
    near = file("b", MB, 0.099)
    near = replace(near, verified=replace(near.verified, verdict=verdict(summarize(tokens(0.099)), ())))
    assert any(
        "usable lies within two standard errors" in line and "--windows 16" in line for line in following(report(near))
    )


def test_gaps_of_an_importance_matrix_are_named() -> None:
    unseen, missing = coverage_gaps(coverage())
    assert "knows nothing of 2 experts' matrices, most of all in blk.0.ffn_up_exps" in unseen
    assert "no entry for 1 matrices of the model, such as output.weight" in missing
    (only,) = coverage_gaps(coverage((5, 1, 3, 8)))
    assert only == missing
    foreign = replace(coverage((1, 1, 1, 1)), missing=(), unknown=("blk.99.attn_q.weight",))
    assert "blk.99.attn_q.weight: is it another model's?" in next(coverage_gaps(foreign))


@pytest.mark.parametrize(
    "files", [[file("a", 1, None)], [file("a", 1, 0.0)], [file("a", 5, 0.02)]], ids=lambda each: ""
)
def test_any_report_has_advice(files: list[FileFacts]) -> None:
    found = advice(report(*files))
    assert found[0].topic == "Which file to take"
    assert all(sentence.endswith(".") for each in found for sentence in each.sentences)


def test_files_for_other_runtimes_are_not_held_against_each_other() -> None:
    small, folder = file("small", 90 * MB, 0.01), replace(file("folder", 95 * MB, 0.08), kind="awq")
    assert not beaten([small, folder])
    assert set(beaten([small, replace(folder, kind=small.kind)])) == {"folder"}
