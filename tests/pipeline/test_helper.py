"""Runs of several ranks: the bytes of one, also after a stop, with experts, with every sum that is made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import RankError
from whit.models.open import open_model
from whit.parallel import CAN_FORK
from whit.pipeline.effort import Calibration
from whit.pipeline.folder import write_model
from whit.pipeline.helper import help_with
from whit.pipeline.job import dismiss
from whit.ranks import ALONE, Ranks, joined
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.rounding.methods import Effort

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="ranks are forked here, which this system cannot do")


@contextmanager
def together(size: int, store: Path, work: Callable[[Ranks], None]) -> Iterator[Ranks]:
    """This process as the first of several; the others, forked, do `work` as long as the context lasts."""
    children = []
    for rank in range(1, size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with joined(dist.FileStore(str(store), size), rank, size) as ranks:
                    work(ranks)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    try:
        with joined(dist.FileStore(str(store), size), 0, size) as ranks:
            yield ranks
    finally:
        for pid in children:
            os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads do not survive a fork
    yield
    torch.set_num_threads(before)


def saved(kind: str, folder: Path, **changes: object) -> Path:
    save_tiny(kind, folder, vocab_size=TOY_VOCAB, **changes)
    save_toy_tokenizer("llama", folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("ranks") / "llama")


def write(  # type: ignore[no-untyped-def]
    model: Path, out: Path, name: str, ranks: Ranks, rounding: str, strength: float, windows: int, tell=None
) -> None:
    recipe = folder_recipe(name, rounding) or recipe_named(name, rounding)
    text = torch.tensor(random_tokens(windows * 16)).view(windows, 16)
    calibration = Calibration(text, strength, Effort(sweeps=1), ranks=ranks)
    write_model(open_model(model), recipe, out, progress=tell, calibration=calibration)


def helping(model: Path) -> Callable[[Ranks], None]:
    """Each opens the model itself: forked processes would share the place in its files."""
    return lambda ranks: help_with(open_model(model), ranks)


def written(
    model: Path, out: Path, size: int, name: str, rounding: str = "feedback", strength: float = 0.0, windows: int = 9
) -> dict[str, bytes]:
    if size == 1:
        write(model, out, name, ALONE, rounding, strength, windows)
    else:
        with together(size, out.with_name(f"{out.name}.store"), helping(model)) as ranks:
            write(model, out, name, ranks, rounding, strength, windows)
            dismiss(ranks)
    return content(out)


def content(out: Path) -> dict[str, bytes]:
    files = [out] if out.is_file() else sorted(out.iterdir())
    return {file.name if out.is_dir() else "": file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("name", "rounding", "strength", "sizes"),
    [("q4_k_m", "feedback", 0.0, (2, 4)), ("gptq-4bit-g32", "gptq", 0.5, (2,))],
)
def test_several_ranks_write_the_bytes_of_one(
    llama: Path, tmp_path: Path, name: str, rounding: str, strength: float, sizes: tuple[int, ...]
) -> None:
    alone = written(llama, tmp_path / "1", 1, name, rounding, strength)
    for size in sizes:
        assert written(llama, tmp_path / f"{size}", size, name, rounding, strength) == alone


def test_experts_that_only_some_ranks_have_seen_and_a_rank_without_windows(tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path / "model", num_experts=8, num_experts_per_tok=1)
    alone = written(model, tmp_path / "1", 1, "q4_0", windows=2)
    assert written(model, tmp_path / "3", 3, "q4_0", windows=2) == alone


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1)])
def test_a_stopped_run_goes_on_with_another_number_of_ranks(
    llama: Path, tmp_path: Path, before: int, after: int
) -> None:
    alone = written(llama, tmp_path / "whole", 1, "w8a8", "fisher-feedback", 0.5)

    def stop(done: int, total: int, what: str) -> None:
        if (what, total) == ("block 1", 3):  # not that of the sweep before
            raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        ranks = ALONE
        if before > 1:
            ranks = stack.enter_context(together(before, tmp_path / "store", helping(llama)))
        with pytest.raises(KeyboardInterrupt):
            write(llama, tmp_path / "a", "w8a8", ranks, "fisher-feedback", 0.5, 9, stop)
    assert (tmp_path / ".a.quantizing" / "block-00000").exists()
    assert written(llama, tmp_path / "a", after, "w8a8", "fisher-feedback", 0.5) == alone


def test_a_rank_that_ends_is_an_error_of_the_first(llama: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(RankError, match="Another rank of 2 has ended"),
        together(2, tmp_path / "store", lambda ranks: ranks.said(None)) as ranks,
    ):
        write(llama, tmp_path / "a", "q4_0", ranks, "feedback", 0.0, 4)
    assert not (tmp_path / "a").exists()
