"""Planted faults are caught and named; untouched files are good."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from trained import save_trained
from whit.checkpoints.gguf import GGUFFile
from whit.errors import ModelError
from whit.evaluation.verdict import BROKEN, DAMAGED, EXCELLENT, GOOD
from whit.models.open import open_model
from whit.pipeline.effort import PRESETS, Calibration
from whit.pipeline.folder import FolderJob
from whit.pipeline.quantize import write_gguf
from whit.pipeline.verify import Verified, verify
from whit.recipes.folders import folder_recipe
from whit.recipes.recipe import Recipe, Rule

Tensors = dict[str, torch.Tensor]
UP = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Place:
    """A trained model, another one, windows that neither has seen, and a q4_0 file of each."""

    folder: Path
    windows: torch.Tensor

    @property
    def original(self) -> Path:
        return self.folder / "model"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("verify")
    windows = save_trained(folder / "model")
    save_tiny("llama", folder / "other", seed=1, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", folder / "other")
    for name in ("model", "other"):
        write_gguf(open_model(folder / name), Recipe("q4_0", (Rule("*", "q4_0"),)), folder / f"{name}.gguf")
    return Place(folder, windows[:8])


def checked(place: Place, path: Path) -> Verified:
    return verify(path, open_model(place.original), place.windows)


def with_bytes(place: Place, out: Path, change: Callable[[GGUFFile], Tensors]) -> Path:
    """The q4_0 file with other bytes in some tensors."""
    file = GGUFFile(place.folder / "model.gguf")
    with out.open("wb") as written:
        file.with_changes(written, change(file).items())
    return out


def rows_of(file: GGUFFile, name: str) -> torch.Tensor:
    """Bytes [rows, bytes per row]."""
    return file.raw(name).view(file.info(name).shape[0], -1)


def swapped_nibbles(file: GGUFFile) -> Tensors:
    blocks = file.raw("blk.1.ffn_down.weight").view(-1, 18).clone()
    blocks[:, 2:] = (blocks[:, 2:] << 4) | (blocks[:, 2:] >> 4)
    return {"blk.1.ffn_down.weight": blocks.flatten()}


def zeroed_scale(file: GGUFFile) -> Tensors:
    blocks = file.raw("blk.0.ffn_gate.weight").view(-1, 18).clone()
    blocks[11, :2] = 0
    return {"blk.0.ffn_gate.weight": blocks.flatten()}


def rotary_order(file: GGUFFile) -> Tensors:
    rows = rows_of(file, "blk.1.attn_q.weight")
    pairs = rows.view(4, 2, 8, -1).transpose(1, 2).reshape(rows.shape)
    return {"blk.1.attn_q.weight": pairs.flatten()}


def transposed(file: GGUFFile) -> Tensors:
    from whit.grids.named import grid_named
    from whit.layouts.ggml import GGML_TYPES
    from whit.rounding.nearest import nearest

    W = file.read("blk.0.attn_q.weight").T.contiguous()
    return {"blk.0.attn_q.weight": GGML_TYPES["Q4_0"].pack(nearest(W, grid_named("q4_0")))}


def zero_bytes(file: GGUFFile) -> Tensors:
    raw = file.raw("blk.1.attn_output.weight").clone()
    raw[len(raw) // 4 * 3 :] = 0
    return {"blk.1.attn_output.weight": raw}


def swapped_gate(file: GGUFFile) -> Tensors:
    gate, up = "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"
    return {gate: file.raw(up), up: file.raw(gate)}


def wrong_norm(file: GGUFFile) -> Tensors:
    return {"blk.1.ffn_norm.weight": file.raw("blk.0.attn_norm.weight")}


def not_a_number(file: GGUFFile) -> Tensors:
    blocks = file.raw("blk.0.attn_v.weight").view(-1, 18).clone()
    blocks[0, :2] = 255  # a scale that is no number
    return {"blk.0.attn_v.weight": blocks.flatten()}


GGUF_FAULTS = {
    "swapped nibbles": (swapped_nibbles, "blk.1.ffn_down.weight", "the wrong nibble first"),
    "a zeroed scale": (zeroed_scale, "blk.0.ffn_gate.weight", "32 weights are zero"),
    "rotary order": (rotary_order, "blk.1.attn_q.weight", "rotary halves and pairs are mixed up (heads of 16)"),
    "a transposed matrix": (transposed, "blk.0.attn_q.weight", "it is transposed"),
    "zero bytes": (zero_bytes, "blk.1.attn_output.weight", "scales or bytes are lost there"),
    "swapped gate and up": (swapped_gate, "blk.0.ffn_gate.weight", "it holds the values of blk.0.ffn_up.weight"),
    "a wrong norm": (wrong_norm, "blk.1.ffn_norm.weight", "it holds the values of blk.0.attn_norm.weight"),
}


@pytest.mark.parametrize("case", GGUF_FAULTS)
def test_a_planted_fault_is_caught_and_named(place: Place, tmp_path: Path, case: str) -> None:
    change, name, words = GGUF_FAULTS[case]
    found = checked(place, with_bytes(place, tmp_path / "broken.gguf", change))
    assert not found.verdict.passed
    (fault, *others) = found.faults
    assert fault.startswith(f"{name}: ")
    assert words in fault
    assert len(others) == (case == "swapped gate and up")
    assert name in {each.name for each in found.culprits if each.kl is not None and each.damage.fault}


def test_a_layer_of_another_model_is_named(place: Place, tmp_path: Path) -> None:
    other = GGUFFile(place.folder / "other.gguf")
    matrices = [name for name in other.names() if name.startswith("blk.1.") and "norm" not in name]
    found = checked(place, with_bytes(place, tmp_path / "a.gguf", lambda file: {n: other.raw(n) for n in matrices}))
    assert not found.verdict.passed
    (fault,) = found.faults
    assert fault.startswith("block 1 (")
    assert fault.endswith("its values are not this model's")


def test_what_is_no_number_breaks_a_file(place: Place, tmp_path: Path) -> None:
    found = checked(place, with_bytes(place, tmp_path / "nan.gguf", not_a_number))
    assert found.verdict.word == BROKEN
    assert "NaN" in found.verdict.why
    assert any("blk.0.attn_v.weight: 32 of" in fault for fault in found.faults)


def test_a_truncated_file_is_broken(place: Place, tmp_path: Path) -> None:
    path = Path(shutil.copy(place.folder / "model.gguf", tmp_path / "cut.gguf"))
    os.truncate(path, path.stat().st_size - 2000)
    found = checked(place, path)
    assert found.verdict.word == BROKEN
    assert "truncated" in found.verdict.why


def folder_of(place: Place, kind: str, out: Path) -> Path:
    recipe = folder_recipe(kind)
    assert recipe is not None
    FolderJob(open_model(place.original), recipe).write(out)
    return out


def test_zero_points_of_the_wrong_version_are_named(place: Place, tmp_path: Path) -> None:
    path = folder_of(place, "gptq-4bit-g32", tmp_path / "gptq")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (path / "config.json").write_text(json.dumps(config))
    found = checked(place, path)
    assert not found.verdict.passed
    assert "zero points of gptq, but checkpoint_format says gptq_v2" in found.faults[0]
    assert "two decoders read different values in 14 of 21 tensors" in found.faults[1]
    assert any("zero points of another version" in fault for fault in found.faults[2:])


def test_a_zeroed_scale_of_a_folder_is_named(place: Place, tmp_path: Path) -> None:
    path = folder_of(place, "w4a16-g32", tmp_path / "out")
    tensors = load_file(path / "model.safetensors")
    tensors[f"{UP}.weight_scale"][5, 1] = 0
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    found = checked(place, path)
    (fault,) = found.faults
    assert fault.startswith("blk.0.ffn_up.weight: about 32 weights are zero, but should not be (row 5 from column 32)")
    assert found.verdict.word == DAMAGED


def test_another_model_is_an_error(place: Place, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "wide", vocab_size=TOY_VOCAB, intermediate_size=128)
    save_toy_tokenizer("llama", tmp_path / "wide")
    with pytest.raises(ModelError, match="they are different models"):
        verify(place.folder / "model.gguf", open_model(tmp_path / "wide"), place.windows)


GOOD_FOLDERS = ("gptq-8bit-g32", "gptq-4bit-g32", "awq-4bit-g32", "w8a16-g32", "w4a16-g32", "w8a8", "fp8", "nf4")


@pytest.mark.parametrize("kind", GOOD_FOLDERS)
def test_an_untouched_folder_is_good(place: Place, tmp_path: Path, kind: str) -> None:
    found = checked(place, folder_of(place, kind, tmp_path / "out"))
    assert found.faults == ()
    assert found.verdict.word in (EXCELLENT, GOOD)
    assert found.alone == 0


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "f16"])
def test_an_untouched_file_is_good(place: Place, tmp_path: Path, kind: str) -> None:
    write_gguf(open_model(place.original), Recipe(kind, (Rule("*", kind),)), tmp_path / "out.gguf")
    found = checked(place, tmp_path / "out.gguf")
    assert found.faults == ()
    assert found.verdict.word in (EXCELLENT, GOOD)
    assert found.result is not None
    assert found.continuations is not None


@pytest.mark.parametrize("kind", ["q4_0", "int3-g32", "int2-g32-asym"])
def test_calibrated_rounding_is_no_fault(place: Place, tmp_path: Path, kind: str) -> None:
    """Its columns are rescaled, its errors larger than those of plain rounding."""
    recipe = Recipe(kind, (Rule("token_embd.weight", "f16"), Rule("output.weight", "f16"), Rule("*", kind, "feedback")))
    model = open_model(place.original)
    work = PRESETS["fast"]
    calibration = Calibration(place.windows[:4], work.strength, work.effort, "text")
    if kind == "q4_0":
        path = write_gguf(model, recipe, tmp_path / "out.gguf", calibration=calibration).path
    else:
        from dataclasses import replace

        path = tmp_path / "out"
        FolderJob(model, replace(recipe, layout="whit")).write(path, calibration=calibration)
    assert checked(place, path).faults == ()
