"""`whit quantize --ranks`: the bytes of one, and one message when a rank dies."""

from datetime import timedelta
from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli import ranks
from whit.cli.app import run
from whit.pipeline.job import Job


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", folder)
    return folder


def quantize(model: Path, out: Path, *more: str) -> int:
    text = model.parent / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    options = ["--recipe", "q4_0", "--calib", str(text), "--windows", "3", "--preset", "fast", "--no-verify"]
    return run(["quantize", str(model), *options, "-o", str(out), *more])


def test_two_ranks_write_the_bytes_of_one_and_one_that_dies_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[ranks._Helper] = []

    class Noted(ranks._Helper):
        def wait(self) -> None:
            super().wait()
            started.append(self)

    monkeypatch.setattr(ranks, "_Helper", Noted)
    assert quantize(llama, tmp_path / "1") == 0
    assert quantize(llama, tmp_path / "2", "--ranks", "2") == 0
    assert (tmp_path / "2").read_bytes() == (tmp_path / "1").read_bytes()
    assert [helper.process.returncode for helper in started] == [0]

    offer = Job.offer

    def last(job: Job) -> None:
        offer(job)
        started[-1].process.kill()

    monkeypatch.setattr(Job, "offer", last)
    capsys.readouterr()
    assert quantize(llama, tmp_path / "3", "--ranks", "2") == 2
    said = capsys.readouterr().err
    assert "Rank 1 of 2 ended before its work was done: SIGKILL" in said
    assert "Traceback" not in said
    assert not (tmp_path / "3").exists()


def test_a_rank_that_dies_before_they_meet_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dying(ranks._Helper):
        def wait(self) -> None:
            super().wait()
            self.process.kill()

    monkeypatch.setattr(ranks, "_Helper", Dying)
    monkeypatch.setattr("whit.ranks.MEETING", timedelta(seconds=1))
    assert quantize(llama, tmp_path / "out", "--ranks", "2") == 2
    assert "Rank 1 of 2 ended before its work was done: SIGKILL" in capsys.readouterr().err


def test_ranks_need_a_text(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(llama), "--recipe", "q8_0", "--rounding", "nearest", "-o", "a", "--ranks", "2"]) == 2
    assert "--ranks shares out what is done with a text" in capsys.readouterr().err
