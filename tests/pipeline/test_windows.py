"""Hidden states on disk: what was put there, and runs that end with the bytes of those in memory."""

import errno
from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import OutputError, RecipeError
from whit.models.open import open_model
from whit.pipeline import calibrated
from whit.pipeline.effort import Calibration
from whit.pipeline.forecast import must_spill, rounding_bytes
from whit.pipeline.quantize import plan_gguf, write_gguf
from whit.pipeline.windows import Spilled
from whit.recipes.named import recipe_named
from whit.rounding.methods import Effort


def test_windows_come_back_as_they_were_put(tmp_path: Path) -> None:
    windows = Spilled(tmp_path)
    expected = [torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    for each in expected:
        windows.append(each)
    windows[2] = expected[2] = torch.ones(1, 5, 3)
    assert len(windows) == 4
    assert all(torch.equal(windows[n], expected[n]) for n in range(4))
    assert list(tmp_path.iterdir()) == []  # a file without a name
    windows.clear()
    assert len(windows) == 0
    windows.append(expected[1])
    assert torch.equal(windows[0], expected[1])


def test_a_full_disk_is_a_message(tmp_path: Path) -> None:
    class Full:
        def seek(self, place: int) -> None:
            pass

        def write(self, raw: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    windows = Spilled(tmp_path)
    windows._file = Full()  # type: ignore[assignment]
    with pytest.raises(OutputError, match="hidden states cannot be written .No space left on device.*allow more --ram"):
        windows.append(torch.ones(1, 5, 3))


def test_a_limit_is_kept_by_spilling_with_the_same_bytes_also_after_a_stop_and_refused_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "m", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "m")
    model, recipe = open_model(tmp_path / "m"), recipe_named("q4_0", "gptq")
    plan, text = plan_gguf(model, recipe), torch.tensor(random_tokens(5 * 16)).view(5, 16)
    least, n_spilled = int(rounding_bytes(model, plan, 0)) + 1, []

    class Counted(Spilled):
        def append(self, window: torch.Tensor, /) -> None:
            super().append(window)
            n_spilled.append(window)

    def write(out: Path, ram: int | None, stop: str = "") -> bytes:
        def tell(done: int, total: int, what: str) -> None:
            if what == stop:
                raise KeyboardInterrupt

        calibration = Calibration(text, 0.5, Effort(sweeps=0), ram=ram)
        write_gguf(model, recipe, out, progress=tell, calibration=calibration)
        return out.read_bytes()

    monkeypatch.setattr(calibrated, "Spilled", Counted)
    expected = write(tmp_path / "memory", 10**12)
    assert not n_spilled
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "disk", least, "block 1")
    assert write(tmp_path / "disk", least) == expected
    assert n_spilled
    with pytest.raises(RecipeError, match=rf"takes about {least / 1e6:,.0f} MB at least, with hidden states on disk"):
        must_spill(model, plan, 1, least - 2)
