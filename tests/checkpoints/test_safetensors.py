import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from whit.checkpoints.safetensors import SafetensorsFile
from whit.errors import BrokenFileError


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_tensors_come_as_the_safetensors_package_reads_them(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.ones(()).to(dtype), "c": torch.zeros(0, 4).to(dtype)},
        path,
    )
    file, expected = SafetensorsFile(path), load_file(path)
    assert set(file.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(file.read(name), tensor)
        assert file.info(name).shape == tuple(tensor.shape)


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(BrokenFileError, match=f"truncated.*{len(whole):,} bytes but the file has {len(whole) - 100:,}"):
        SafetensorsFile(path)


@pytest.mark.parametrize("n_bytes", [0, 4, 8, 20])
def test_a_file_cut_in_its_header_is_refused(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(BrokenFileError, match="truncated"):
        SafetensorsFile(path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"{broken", "header is corrupt"),
        (b"\xff\xfe{}", "header is corrupt"),
        ([1, 2], "header is corrupt"),
        ({"a": {"dtype": "F32"}}, "missing"),
        ({"a": F32 | {"dtype": "F31"}}, "F31"),
        ({"a": F32 | {"shape": [-2]}}, "whole numbers"),
        ({"a": F32 | {"shape": [3]}}, "takes 12 bytes, its offsets span 8"),
        ({"a": F32 | {"data_offsets": [8, 0]}}, "span -8"),
        ({"a": F32, "b": F32}, "does not start where the previous tensor ends"),
        ({"a": F32 | {"data_offsets": [4, 12]}}, "does not start where"),
        ({"a": F32 | {"shape": [2**62], "data_offsets": [0, 2**64]}}, "truncated"),
    ],
)
def test_a_corrupt_header_is_explained(tmp_path: Path, header: object, why: str) -> None:
    with pytest.raises(BrokenFileError, match=why):
        SafetensorsFile(write(tmp_path / "a.safetensors", header, b"\0" * 16))


def test_an_absurd_header_length_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60))
    with pytest.raises(BrokenFileError, match="not a safetensors file"):
        SafetensorsFile(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenFileError, match="gone.safetensors: no such file"):
        SafetensorsFile(tmp_path / "gone.safetensors")
