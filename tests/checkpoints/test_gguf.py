import io
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.checkpoints.gguf import Announced, GGUFFile, GGUFWriter, natural_type
from whit.errors import BrokenFileError, ModelError

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["a", "é", ""],
    "tokenizer.ggml.token_type": [1, -1, 3],
    "tokenizer.ggml.scores": [0.5, -1.0],
    "flags": [True, False],
    "flag": True,
}


def write(path: Path, values: dict[str, torch.Tensor] | None = None, metadata: dict[str, object] = METADATA) -> Path:
    values = values if values is not None else {"w": torch.arange(64.0).view(2, 32), "n": torch.ones(5)}
    announced = [Announced(name, tuple(tensor.shape), "F32") for name, tensor in values.items()]
    writer = GGUFWriter(metadata, announced)
    with path.open("wb") as file:
        writer.write(file, ((name, [tensor.reshape(-1).view(torch.uint8)]) for name, tensor in values.items()))
    assert path.stat().st_size == writer.n_bytes
    return path


def test_what_is_written_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write(tmp_path / "a.gguf"))
    assert reader.get_field("llama.block_count").types == [gguf.GGUFValueType.UINT32]
    for key, value in METADATA.items():
        field = reader.get_field(key)
        contents = field.contents()
        assert contents == value if not isinstance(value, float) else contents == pytest.approx(value)
    assert [t.name for t in reader.tensors] == ["w", "n"]
    np.testing.assert_array_equal(reader.tensors[0].data, np.arange(64, dtype=np.float32).reshape(2, 32))
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "gpt2")
    writer.add_uint8("small", 7)
    writer.add_int64("long", -(2**40))
    writer.add_float64("double", 0.1)
    writer.add_array("names", ["x", "y"])
    W = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    writer.add_tensor("w", W)
    writer.add_tensor(
        "q", gguf.quants.quantize(W, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "b.gguf")
    assert {k: file.metadata[k] for k in ("small", "long", "double", "names")} == {
        "small": 7, "long": -(2**40), "double": 0.1, "names": ["x", "y"]
    }  # fmt: skip
    assert torch.equal(file.read("w"), torch.from_numpy(W))
    assert (file.info("q").dtype, file.info("q").shape) == ("Q8_0", (4, 256))


def test_metadata_survives_a_copy_with_its_types(tmp_path: Path) -> None:
    first = GGUFFile(write(tmp_path / "a.gguf"))
    types = first.types | {"llama.block_count": (10, None)}
    buffer = io.BytesIO()
    GGUFWriter(first.metadata, [], types).write(buffer, [])
    (tmp_path / "c.gguf").write_bytes(buffer.getvalue())
    second = GGUFFile(tmp_path / "c.gguf")
    assert (second.metadata, second.types) == (first.metadata, types)


@pytest.mark.parametrize("kind", list(gguf.GGMLQuantizationType))
def test_every_type_that_the_gguf_package_decodes_is_read(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 64, (2, 2 * block_bytes), dtype=np.uint8)
    try:
        expected = gguf.quants.dequantize(raw, kind)
    except NotImplementedError:
        expected = None
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "t.gguf")
    assert file.info("w").shape == (2, 2 * block)
    if expected is not None:
        np.testing.assert_array_equal(file.read("w").float().numpy(), expected.astype(np.float32))
    elif kind.name != "BF16":
        with pytest.raises(ModelError, match=f"type {kind.name}, which cannot be decoded"):
            file.read("w")


@given(cut=st.integers(0, 2000))
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_refused_with_a_reason(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = write(tmp_path_factory.mktemp("cut") / "a.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole) - 33)])
    with pytest.raises(BrokenFileError, match="truncated|not a GGUF file"):
        GGUFFile(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_corrupt_header_never_gives_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write(tmp_path_factory.mktemp("corrupt") / "a.gguf")
    raw = bytearray(path.read_bytes())
    for _ in range(3):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        file = GGUFFile(path)
        for name in file.names():
            file.read(name)
    except ModelError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("name", ["a" * 65536, "general\x1b[31m.name"])
def test_what_is_no_name_is_not_shown(name: str, tmp_path: Path) -> None:
    content = name.encode()
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(content)) + content + bytes(99))
    with pytest.raises(BrokenFileError, match="a metadata key") as caught:
        GGUFFile(tmp_path / "a.gguf")
    message = str(caught.value).replace(str(tmp_path), "")
    assert len(message) < 200
    assert message.isprintable()


def test_absurd_counts_are_not_allocated(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1))
    with pytest.raises(BrokenFileError, match="number of tensors"):
        GGUFFile(tmp_path / "a.gguf")


def test_a_big_endian_file_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(BrokenFileError, match="big-endian"):
        GGUFFile(tmp_path / "a.gguf")


def test_something_else_is_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 this is a zip file")
    with pytest.raises(BrokenFileError, match="not a GGUF file"):
        GGUFFile(tmp_path / "a.gguf")


def test_one_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="one of 3 parts"):
        GGUFFile(write(tmp_path / "a.gguf", metadata=METADATA | {"split.count": 3}))


def test_pieces_must_add_up_to_what_was_announced() -> None:
    writer = GGUFWriter({}, [Announced("w", (2, 2), "F32")])
    with pytest.raises(ValueError, match="w: 8 bytes were given, 16 announced"):
        writer.write(io.BytesIO(), [("w", [torch.zeros(8, dtype=torch.uint8)])])


@pytest.mark.parametrize("value", [None, {}, [], [1, "a"], object()])
def test_values_that_gguf_cannot_hold_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="metadata key cannot hold"):
        natural_type("key", value)
