"""Releases that are stopped, spoiled or repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import OutputError
from whit.models.open import open_model
from whit.pipeline import folder
from whit.pipeline.effort import Calibration
from whit.release import job as jobs
from whit.release.job import Job, Order, Outcome
from whit.release.variants import variants_of
from whit.rounding.methods import Effort

VARIANTS = "q4_0,q8_0,gptq-4bit"
SCRIPT = """
import os, signal, sys
from pathlib import Path
from test_job import released
released(Path(sys.argv[1]), Path(sys.argv[2]), kill=sys.argv[3])
"""
KILL = ""


@contextmanager
def bar(what: str) -> Iterator[object]:
    """Kills this process in the middle of what it was told to."""
    calls = [0]

    def report(done: int, total: int, part: str) -> None:
        calls[0] += 1
        if KILL and KILL in what and calls[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    yield report


def released(
    model: Path, out: Path, names: str = VARIANTS, kill: str = "", asked: str = "text", texts: list[str] | None = None
) -> list[Outcome]:
    global KILL
    KILL = kill
    opened = open_model(model)
    effort, seen = Calibration(torch.empty(0, 0), effort=Effort(sweeps=1)), [] if texts is None else texts

    def text() -> Calibration:
        seen.append("made")
        return replace(effort, windows=torch.tensor(random_tokens(4 * 32, 0)).view(4, 32), source="random tokens")

    held_out = torch.tensor(random_tokens(2 * 64, 9)).view(2, 64)
    variants = variants_of(opened, names, "m")[0]
    job = Job(Order(opened, variants, out, asked, text, effort, held_out, False), bar)  # type: ignore[arg-type]
    return [job.outcome(each) for each in variants]


def content(out: Path) -> dict[str, bytes]:
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "llama"
    save_tiny("llama", path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", path)
    return path


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    outcomes = released(llama, out)
    assert [each.record.file for each in outcomes] == ["m.Q4_0.gguf", "m.Q8_0.gguf", "m-GPTQ-4bit"]
    assert not any(each.failed or each.kept or each.faults for each in outcomes)
    assert all(each.record.result.kl_mean > 0 for each in outcomes)
    return content(out)


def test_a_release_that_was_killed_ends_with_the_same_bytes(
    llama: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, str(Path(here).parent), *sys.path])
    command = [sys.executable, "-c", SCRIPT, str(llama), str(tmp_path / "out"), "quantizing m.Q8_0.gguf"]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert found.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "m.Q4_0.gguf").exists()
    assert not (tmp_path / "out" / "m.Q8_0.gguf").exists()
    texts: list[str] = []
    outcomes = released(llama, tmp_path / "out", texts=texts)
    assert [each.kept for each in outcomes] == [True, False, False]
    assert texts == []  # the text was kept, too
    assert content(tmp_path / "out") == whole


def test_one_pass_gives_the_moments_of_all_variants(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whit.pipeline import observe

    passes, real = list[str](), observe.gather_statistics

    def counted(*args: object) -> None:
        passes.append("pass")
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(observe, "gather_statistics", counted)
    texts: list[str] = []
    released(llama, tmp_path / "out", texts=texts)
    assert passes == ["pass"]
    assert texts == ["made"]


def test_a_file_that_has_changed_is_made_again(llama: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    released(llama, tmp_path / "out", "q4_0,gptq-4bit")
    (tmp_path / "out" / "m.Q4_0.gguf").write_bytes(b"something else")
    outcomes = released(llama, tmp_path / "out", "q4_0,gptq-4bit")
    assert [each.kept for each in outcomes] == [False, True]
    assert content(tmp_path / "out")["m.Q4_0.gguf"] == whole["m.Q4_0.gguf"]


def test_a_variant_that_is_not_what_was_meant_fails(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*args: object, **more: object) -> object:
        result = folder.write_model(*args, **more)  # type: ignore[arg-type]
        if result.path.suffix == ".gguf":
            raw = bytearray(result.path.read_bytes())
            raw[-2000:-1500] = bytes(500)  # within the last matrix
            result.path.write_bytes(raw)
        return result

    monkeypatch.setattr(jobs, "write_model", spoiled)
    gguf, gptq = released(llama, tmp_path / "out", "q8_0,gptq-4bit")
    assert gguf.failed
    assert gguf.faults
    assert not gptq.failed
    again = released(llama, tmp_path / "out", "q8_0,gptq-4bit")[0]
    assert again.failed  # it is no better the second time


def test_work_of_another_request_is_not_gone_on_with(llama: Path, tmp_path: Path) -> None:
    released(llama, tmp_path / "out", "q8_0")
    with pytest.raises(OutputError, match="another calibration text"):
        released(llama, tmp_path / "out", "q8_0", asked="another text")


def test_a_folder_of_something_else_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is no release"):
        released(llama, tmp_path / "out", "q8_0")
    assert content(tmp_path / "out") == {"thesis.tex": b"years of work"}
