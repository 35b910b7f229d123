import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from whit.checkpoints.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from whit.errors import BrokenFileError, OutputError


@pytest.fixture
def matrix() -> ImportanceMatrix:
    generator = torch.Generator().manual_seed(0)
    means = {
        "blk.0.attn_q.weight": torch.rand(1, 64, generator=generator),
        "blk.0.ffn_down_exps.weight": torch.rand(4, 96, generator=generator),
    }
    counts = {"blk.0.attn_q.weight": torch.tensor([1024]), "blk.0.ffn_down_exps.weight": torch.tensor([512, 0, 100, 1])}
    means["blk.0.ffn_down_exps.weight"][1] = 1.0  # what both kinds say of an expert that nothing reached
    return ImportanceMatrix(means, counts, 2, 512, ("some text",))


@pytest.mark.parametrize("name", ["a.gguf", "a.dat"])
def test_what_was_written_is_read(matrix: ImportanceMatrix, tmp_path: Path, name: str) -> None:
    write_imatrix(matrix, tmp_path / name)
    found = read_imatrix(tmp_path / name)
    assert found.datasets == matrix.datasets
    assert (found.n_chunks, found.chunk_size) == (2, 512)
    assert set(found.means) == set(matrix.means)
    for key, mean in matrix.means.items():
        torch.testing.assert_close(found.means[key].reshape(-1), mean.reshape(-1), rtol=1e-6, atol=0)
    if name == "a.gguf":
        assert found.counts["blk.0.ffn_down_exps.weight"].tolist() == [512, 0, 100, 1]


def test_the_gguf_package_reads_the_sums(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    write_imatrix(matrix, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sums, counts = (tensors[f"blk.0.ffn_down_exps.weight.{part}"] for part in ("in_sum2", "counts"))
    assert counts.shape.tolist() == [1, 4]
    assert counts.data.reshape(-1).tolist() == [512, 0, 100, 1]
    expected = matrix.means["blk.0.ffn_down_exps.weight"].numpy() * counts.data.reshape(4, 1)
    np.testing.assert_allclose(sums.data, expected, rtol=1e-6)
    assert reader.fields["general.type"].contents() == "imatrix"


def test_the_legacy_layout_byte_by_byte(tmp_path: Path) -> None:
    means = {"t": torch.tensor([[0.5, 2.0]])}
    write_imatrix(ImportanceMatrix(means, {"t": torch.tensor([600])}, 2, 512, ("x",)), tmp_path / "a.dat")
    expected = struct.pack("<ii1sii2fii1s", 1, 1, b"t", 2, 2, 1.0, 4.0, 2, 1, b"x")
    assert (tmp_path / "a.dat").read_bytes() == expected


@pytest.mark.parametrize("name", ["a.gguf", "a.dat"])
@pytest.mark.parametrize("lost", [1, 30, 200])
def test_a_truncated_file_is_explained(matrix: ImportanceMatrix, tmp_path: Path, name: str, lost: int) -> None:
    write_imatrix(matrix, tmp_path / name)
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - lost)
    if name == "a.gguf" and lost == 1:
        pytest.skip("that byte is padding")
    with pytest.raises(BrokenFileError, match="truncated"):
        read_imatrix(tmp_path / name)


def test_other_files_are_refused(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no matrix at all, just words\n" * 20)
    with pytest.raises(BrokenFileError):
        read_imatrix(tmp_path / "text")
    (tmp_path / "empty").write_bytes(b"\0\0\0\0")
    with pytest.raises(BrokenFileError, match="holds no importance matrix"):
        read_imatrix(tmp_path / "empty")
    matrix.means["blk.0.attn_q.weight"][0, 3] = float("nan")
    write_imatrix(matrix, tmp_path / "a.dat")
    with pytest.raises(BrokenFileError, match=r"blk\.0\.attn_q\.weight are negative or not finite"):
        read_imatrix(tmp_path / "a.dat")


def test_an_existing_file_is_kept(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text("mine")
    with pytest.raises(OutputError):
        write_imatrix(matrix, tmp_path / "a.dat")
    assert (tmp_path / "a.dat").read_text() == "mine"
