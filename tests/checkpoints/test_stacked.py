"""Stacks of experts in MXFP4: decoded as transformers decodes them, as bytes that the gguf package decodes."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tiny import MemorySource, save_mxfp4
from whit.checkpoints.folder import open_folder
from whit.checkpoints.stacked import StackedTensors
from whit.errors import BrokenFileError

STACK = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def stored() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 8, 2), generator=generator, dtype=torch.uint8)
    return {f"{STACK}_blocks": blocks, f"{STACK}_scales": scales, "model.norm.weight": torch.ones(64)}


def test_values_are_those_of_transformers(stored: dict[str, torch.Tensor]) -> None:
    source = StackedTensors(MemorySource(stored))
    expected = convert_moe_packed_tensors(*list(stored.values())[:2], dtype=torch.float32)
    assert source.info(STACK).shape == tuple(expected.shape) == (3, 64, 8)
    assert torch.equal(source.read(STACK), expected)
    assert torch.equal(source.read_some(STACK, 1, 2), expected[1:3])
    assert list(source.names()) == [STACK, "model.norm.weight"]
    assert torch.equal(source.read("model.norm.weight"), torch.ones(64))


@pytest.mark.parametrize(("part", "of"), [(0, 1), (0, 2), (1, 2)])
def test_bytes_for_ggml_are_the_same_values(stored: dict[str, torch.Tensor], part: int, of: int) -> None:
    source = StackedTensors(MemorySource(stored))
    raw = source.ggml(STACK, part, of).numpy().reshape(3, 8 // of, -1)
    found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    expected = source.read(STACK).transpose(1, 2)[:, part::of].numpy()
    assert np.array_equal(found, expected)
    zeros = [n_negative_zeros(each) for each in (raw.reshape(-1, 17)[:, 1:], packed_rows(stored, part, of))]
    assert zeros[0] == zeros[1] > 0  # the gguf package does not tell them from zeros


def n_negative_zeros(packed: np.ndarray) -> int:
    return int((packed % 16 == 8).sum() + (packed // 16 == 8).sum())


def packed_rows(stored: dict[str, torch.Tensor], part: int, of: int) -> np.ndarray:
    return stored[f"{STACK}_blocks"][:, part::of].numpy()


def test_one_expert_is_read_without_the_others(tmp_path: Path) -> None:
    save_mxfp4(tmp_path)
    folder, _ = open_folder(tmp_path)
    asked: list[int] = []
    file = folder._home[f"{STACK}_blocks"]._file
    read = file.tensor_at
    file.tensor_at = lambda offset, n, what: (asked.append(n), read(offset, n, what))[1]  # type: ignore[method-assign]
    StackedTensors(folder).matrix(STACK, 1)
    n_experts = folder.info(f"{STACK}_blocks").shape[0]
    assert sum(asked) * n_experts == sum(folder.info(f"{STACK}_{each}").n_bytes for each in ("blocks", "scales"))


def test_stacks_that_are_not_whole_are_named(stored: dict[str, torch.Tensor]) -> None:
    alone = {f"{STACK}_blocks": stored[f"{STACK}_blocks"]}
    with pytest.raises(BrokenFileError, match="gate_up_proj_scales is missing"):
        StackedTensors(MemorySource(alone))
    with pytest.raises(BrokenFileError, match="are no MXFP4"):
        StackedTensors(MemorySource({**alone, f"{STACK}_scales": torch.zeros(3, 8, 1, dtype=torch.uint8)}))
