"""The second decoder beside the first, on everything that Whit writes."""

from pathlib import Path

import pytest
import torch

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.quantized import QuantizedTensors
from whit.checkpoints.second import SecondFolder, SecondGGUF, check_header
from whit.errors import BrokenFileError
from whit.layouts.ggml import GGML_TYPES
from whit.models.open import open_model
from whit.pipeline.folder import FolderJob
from whit.pipeline.quantize import write_gguf
from whit.recipes.folders import folder_recipe
from whit.recipes.recipe import Recipe, Rule

FOLDERS = (
    *("gptq-2bit-g32", "gptq-3bit-g32", "gptq-4bit-g32-asym", "gptq-8bit", "awq-4bit-g32", "w3a16-g32"),
    *("w4a16-g32-asym", "w6a16-channel", "w8a8", "fp8", "mxfp4", "nvfp4", "nf4", "fp4", "whit-int3-g32", "whit-q4_k"),
    *("whit-int4-g32-min", "whit-int8-tensor", "whit-fp8-e5m2", "whit-iq4_xs", "whit-int4-g32-asym", "whit-kmeans3"),
    "whit-kmeans2-g64", "kmeans-3bit+2%",
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    save_toy_tokenizer("llama", folder)
    return folder


@pytest.mark.parametrize("kind", sorted(GGML_TYPES))
def test_gguf_types_decode_to_the_same_values(llama: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out.gguf"
    write_gguf(open_model(llama), Recipe(kind, (Rule("*", kind.lower()),)), path)
    file = GGUFFile(path)
    check_header(file)
    second = SecondGGUF(file)
    assert kind in {file.info(name).dtype for name in file.names()}
    for name in file.names():
        torch.testing.assert_close(second.read(name), file.read(name).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_decode_to_the_same_values(llama: Path, tmp_path: Path, kind: str) -> None:
    recipe = folder_recipe(kind)
    assert recipe is not None
    FolderJob(open_model(llama), recipe).write(tmp_path / "out")
    model = open_model(tmp_path / "out")
    assert isinstance(model.tensors, QuantizedTensors)
    decoder = SecondFolder(model.quantization)
    second, layers = model.tensors.with_decoder(decoder.decode), 0
    for name in model.tensors.names():
        layers += model.tensors.is_quantized(name)
        torch.testing.assert_close(second.read(name), model.tensors.read(name), rtol=1e-5, atol=1e-7)
    assert layers >= 6  # one is too narrow for superblocks
    assert decoder.alone == []


def test_a_lying_label_is_taken_at_its_word(llama: Path, tmp_path: Path) -> None:
    recipe = folder_recipe("gptq-4bit-g32")
    assert recipe is not None
    FolderJob(open_model(llama), recipe).write(tmp_path / "out")
    model = open_model(tmp_path / "out")
    assert isinstance(model.tensors, QuantizedTensors)
    decoder = SecondFolder({**model.quantization, "checkpoint_format": "gptq_v2"})
    name = "model.layers.0.mlp.up_proj.weight"
    off = model.tensors.with_decoder(decoder.decode).read(name) - model.tensors.read(name)
    scale = model.tensors.quantized(name).params["scale"].float().repeat_interleave(32, dim=1)
    torch.testing.assert_close(off, scale)  # zero points are one too small


def test_a_file_that_the_package_cannot_read(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    write_gguf(open_model(llama), Recipe("q8_0", (Rule("*", "q8_0"),)), path)
    file = GGUFFile(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(BrokenFileError, match="the gguf package cannot read it"):
        check_header(file)
