from pathlib import Path

import pytest

from tiny import MemorySource
from whit.errors import RecipeError
from whit.models.model import Model
from whit.runtime.large import LARGE, refuse_large


def model(n_bytes: int, method: str = "gptq", folder: Path | None = None) -> Model:
    return Model("my models/big", {}, MemorySource({}), n_bytes, folder, quantization={"quant_method": method})


def test_a_large_folder_gets_the_command_that_serves_it() -> None:
    command = "vllm serve 'my models/big' --host 127.0.0.1 --port 8000 --max-model-len 4096$"
    with pytest.raises(RecipeError, match=command):
        refuse_large(model(LARGE + 1), "127.0.0.1", 8000, 4096)


def test_a_folder_that_vllm_does_not_read_becomes_a_file() -> None:
    command = "whit convert 'my models/big' --format gguf -o model.gguf && whit serve model.gguf$"
    with pytest.raises(RecipeError, match=command):
        refuse_large(model(LARGE + 1, "whit"), "127.0.0.1", 8000, 4096)


def test_small_ones_and_those_that_nothing_else_reads_are_served(tmp_path: Path) -> None:
    refuse_large(model(LARGE), "127.0.0.1", 8000, 4096)
    (tmp_path / "whit.json").touch()
    refuse_large(model(LARGE + 1, folder=tmp_path), "127.0.0.1", 8000, 4096)
