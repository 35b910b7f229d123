from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from whit.checkpoints.folder import open_folder
from whit.checkpoints.safetensors_writer import Shards
from whit.grids.grid import Spec

VALUES = {
    "a": torch.arange(12, dtype=torch.int32).view(3, 4),
    "b": torch.randn(5).half(),
    "c": torch.randn(2, 3).to(torch.float8_e4m3fn),
    "d": torch.tensor(7, dtype=torch.int64),
}
SPECS = {name: Spec(tuple(value.shape), value.dtype) for name, value in VALUES.items()}


def write(folder: Path, shard_bytes: int, names: list[str]) -> Shards:
    shards = Shards(SPECS, shard_bytes)
    shards.create(folder)
    for name in names:
        shards.write(name, VALUES[name])
    return shards


@pytest.mark.parametrize("shard_bytes", [10**9, 50, 1])
def test_the_package_reads_what_was_written_in_any_order(tmp_path: Path, shard_bytes: int) -> None:
    shards = write(tmp_path, shard_bytes, ["d", "b", "a", "c"])
    shards.close()
    assert shards.n_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    theirs = {}
    for file in tmp_path.glob("*.safetensors"):
        theirs |= load_file(file)
    mine, _ = open_folder(tmp_path)
    for name, value in VALUES.items():
        assert torch.equal(theirs[name].float(), value.float())
        assert torch.equal(mine.read(name).float(), value.float())


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    shards = write(tmp_path, 10**9, [])
    with pytest.raises(ValueError, match="announced as"):
        shards.write("a", VALUES["b"])
    with pytest.raises(ValueError, match="not written: a, b, c, d"):
        shards.close()
