"""Runs that are stopped and repeated: the same bytes, or a refusal that says why."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run
from whit.errors import BrokenFileError, OutputError
from whit.models.open import open_model
from whit.pipeline.effort import Calibration
from whit.pipeline.folder import write_model
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.recipes.recipe import Recipe
from whit.rounding.methods import Effort

SCRIPT = """
import os, signal, sys
from pathlib import Path
from test_state import write
def tell(done, total, what):
    if what == "block 1":
        os.kill(os.getpid(), signal.SIGKILL)
write(Path(sys.argv[1]), Path(sys.argv[2]), tell=tell)
"""


MIB = 1 << 20
FILL = "filler"


class Stop(BaseException):
    """Nobody catches this."""


def recipe(name: str) -> Recipe:
    return folder_recipe(name, "feedback") or recipe_named(name, "feedback")


def write(model: Path, out: Path, name: str = "q4_0", seed: int = 0, strength: float = 0.5, tell=None) -> None:  # type: ignore[no-untyped-def]
    text = torch.tensor(random_tokens(4 * 32, seed)).view(4, 32)
    write_model(open_model(model), recipe(name), out, False, tell, Calibration(text, strength, Effort(sweeps=1)))


def content(out: Path) -> dict[str, bytes]:
    files = [out] if out.is_file() else sorted(out.iterdir())
    return {file.name if out.is_dir() else "": file.read_bytes() for file in files}


def stopped(model: Path, out: Path, name: str = "q4_0", at: str = "head") -> Path:
    def tell(done: int, total: int, what: str) -> None:
        if what == at:
            raise Stop

    with pytest.raises(Stop):
        write(model, out, name, tell=tell)
    return out.with_name(f".{out.name}.quantizing")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", folder)
    return folder


@pytest.mark.parametrize("name", ["q4_0", "gptq-4bit-g32", "w8a8"])
@pytest.mark.parametrize("at", ["block 0", "block 1", "head", "done"])
def test_a_run_stopped_at_a_block_ends_with_the_same_bytes(llama: Path, tmp_path: Path, name: str, at: str) -> None:
    write(llama, tmp_path / "whole", name)
    state = stopped(llama, tmp_path / "again", name, at)
    assert state.is_dir()
    told: list[str] = []
    write(llama, tmp_path / "again", name, tell=lambda done, total, what: told.append(what))
    assert content(tmp_path / "again") == content(tmp_path / "whole")
    assert ("block 0" in told) == (at == "block 0")
    assert {path.name for path in tmp_path.iterdir()} == {"again", "whole"}


def test_a_run_stopped_at_any_moment_of_writing_ends_with_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(llama, tmp_path / "whole")
    real, left = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        real(descriptor)

    for n in range(100):
        left[0] = n
        monkeypatch.setattr(os, "fsync", fsync)
        try:
            write(llama, tmp_path / f"{n}")
        except Stop:
            monkeypatch.setattr(os, "fsync", real)
            if not (tmp_path / f"{n}").exists():  # the last one comes after the output has its name
                write(llama, tmp_path / f"{n}")
        else:
            break
        assert content(tmp_path / f"{n}") == content(tmp_path / "whole")
    assert 10 < n < 99


def test_a_killed_process_is_gone_on_from(llama: Path, tmp_path: Path) -> None:
    write(llama, tmp_path / "whole")
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, str(Path(here).parent), *sys.path])
    command = [sys.executable, "-c", SCRIPT, str(llama), str(tmp_path / "again")]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert found.returncode == -signal.SIGKILL
    assert not (tmp_path / "again").exists()
    assert (tmp_path / ".again.quantizing" / "block-00000").exists()
    write(llama, tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "said"), [({"name": "q8_0"}, "recipe"), ({"seed": 1}, "text"), ({"strength": 0.0}, "preset")]
)
def test_the_state_of_another_run_is_refused(llama: Path, tmp_path: Path, change: dict, said: str) -> None:  # type: ignore[type-arg]
    state = stopped(llama, tmp_path / "a")
    with pytest.raises(OutputError, match=f"another {said}.*delete that folder"):
        write(llama, tmp_path / "a", **change)
    assert (state / "block-00001").exists()


def test_the_state_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "other", seed=1, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "other")
    stopped(llama, tmp_path / "a")
    with pytest.raises(OutputError, match="another model"):
        write(tmp_path / "other", tmp_path / "a")


@pytest.mark.parametrize("name", ["run", "block-00000", "hidden-00002"])
@pytest.mark.parametrize("where", [0.01, 0.5, 0.999])
def test_one_wrong_bit_is_found(llama: Path, tmp_path: Path, name: str, where: float) -> None:
    file = stopped(llama, tmp_path / "a") / name
    raw = bytearray(file.read_bytes())
    raw[int(where * len(raw))] ^= 1
    file.write_bytes(raw)
    with pytest.raises(BrokenFileError, match="damaged.*Delete the folder"):
        write(llama, tmp_path / "a")


def test_a_full_disk_leaves_the_finished_blocks(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(llama, tmp_path / "whole")
    real, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 7:  # within what the second block keeps
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"disk is full.*Finished blocks \(1\) are kept"):
        write(llama, tmp_path / "a")
    monkeypatch.setattr(os, "fsync", real)
    write(llama, tmp_path / "a")
    assert content(tmp_path / "a") == content(tmp_path / "whole")


def test_a_text_that_is_part_of_a_larger_tensor_is_taken(llama: Path, tmp_path: Path) -> None:
    windows = torch.tensor(random_tokens(4 * 40, 0)).view(4, 40)[:, :32]
    assert not windows.is_contiguous()
    for out, text in (("part", windows), ("own", windows.contiguous())):
        write_model(
            open_model(llama), recipe("q4_0"), tmp_path / out, calibration=Calibration(text, effort=Effort(sweeps=1))
        )
    assert content(tmp_path / "part") == content(tmp_path / "own")


def quantize(model: Path, out: Path) -> int:
    """On the command line."""
    settings = ["--recipe", "q4_0", "--preset", "fast", "--windows", "4", "--no-verify"]
    return run(["quantize", str(model), "-o", str(out), *settings])


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=False).returncode:
        pytest.skip("a file system can be mounted by root alone, and not everywhere")
    yield place
    subprocess.run(["umount", place], check=True)


def leave(place: Path, n_bytes: int) -> None:
    """Fill a disk but for so many bytes."""
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (place / FILL).write_bytes(bytes(free - n_bytes))


def test_a_disk_that_fills_up_in_the_middle(
    llama: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "a.gguf"
    assert quantize(llama, tmp_path / kind) == 0
    n_bytes, blocks = (tmp_path / kind).stat().st_size, []
    for more in range(MIB // 4, MIB, MIB // 8):  # until it fills up where some blocks are finished
        leave(small, n_bytes + more)
        capsys.readouterr()
        assert quantize(llama, small / kind) == 2
        shown = capsys.readouterr().err
        assert "the disk is full" in shown or "are free on that disk" in shown
        assert {each.name for each in small.iterdir()} <= {FILL, f".{kind}.quantizing"}
        blocks = sorted(each.name for each in (small / f".{kind}.quantizing").glob("block-*"))
        if blocks:
            assert f"Finished blocks ({len(blocks)}) are kept" in shown
            break
        (small / FILL).unlink()
    assert blocks
    (small / FILL).unlink()
    assert quantize(llama, small / kind) == 0
    assert (small / kind).read_bytes() == (tmp_path / kind).read_bytes()
    assert [each.name for each in small.iterdir()] == [kind]
