"""Folders in which all experts of a layer are one MXFP4 tensor, as GPT-OSS is published: seen as floats.

    NAME_blocks  uint8 [experts, rows, cols / 32, 16]    two weights to a byte, the first in the low bits
    NAME_scales  uint8 [experts, rows, cols / 32]        exponents, 127 for one

stand for NAME [experts, cols, rows], which is how transformers multiplies with it. GGML's type of this name has the
same blocks with their weights in another order, so that a file of it takes them bit for bit, negative zeros included.
Source: transformers' integration of mxfp4; the GGML block formats in docs/formats.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from whit.checkpoints.source import TensorInfo, TensorSource, read_some
from whit.errors import BrokenFileError
from whit.grids.quantized import QuantizedTensor
from whit.layouts.compressed import MXFP4, CompressedTensors

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
PER_BLOCK, PER_BYTE = 32, 2
GGML_BYTES = 1 + PER_BLOCK // PER_BYTE  # of a block


class StackedTensors:
    """A folder's tensors with stacks of experts decoded."""

    def __init__(self, source: TensorSource) -> None:
        """Only headers are read. Raises BrokenFileError for stacks that are not whole."""
        self._source = source
        self._names: list[str] = []
        self._shapes: dict[str, tuple[int, int, int, int]] = {}  # of blocks
        there = set(source.names())
        for name in source.names():
            if name.endswith(BLOCKS):
                stack = name.removesuffix(BLOCKS)
                self._shapes[stack] = self._checked(stack, there)
                self._names.append(stack)
            elif not name.endswith(SCALES):
                self._names.append(name)

    def names(self) -> Sequence[str]:
        """Floats and decoded stacks, in file order."""
        return self._names

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is a stack of experts in MXFP4."""
        return name in self._shapes

    def info(self, name: str) -> TensorInfo:
        """Shape of the stack; type and bytes of what it is stored as."""
        if name not in self._shapes:
            return self._source.info(name)
        experts, rows, blocks, _ = self._shapes[name]
        n_bytes = sum(self._source.info(name + each).n_bytes for each in (BLOCKS, SCALES))
        return TensorInfo(name, (experts, blocks * PER_BLOCK, rows), METHOD, n_bytes)

    def read(self, name: str) -> Tensor:
        """A float as stored, a stack [experts, cols, rows] decoded to float32."""
        return self.read_some(name, 0, self.info(name).shape[0]) if name in self._shapes else self._source.read(name)

    def read_some(self, name: str, start: int, n: int) -> Tensor:
        """Entries `start` to `start + n` along the first dimension, experts of a stack."""
        if name not in self._shapes:
            return read_some(self._source, name, start, n)
        W = torch.stack([self.matrix(name, expert).dequantize() for expert in range(start, start + n)])
        return W.transpose(1, 2).contiguous()

    def matrix(self, name: str, expert: int, part: int = 0, of: int = 1) -> QuantizedTensor:
        """The codes of one expert, [rows, cols].

        part, of  only every of-th row, from row `part` on
        """
        blocks, scales = (each[part::of].contiguous() for each in self._stored(name, expert))
        packed = {"weight_packed": blocks.flatten(1), "weight_scale": scales}
        return CompressedTensors(MXFP4).unpack(packed, {"num_bits": 4, "type": "float", "group_size": PER_BLOCK})

    def ggml(self, name: str, part: int = 0, of: int = 1) -> Tensor:
        """All experts, or some rows of each as `matrix` has them, as flat uint8 bytes of GGML's MXFP4."""
        experts, rows, blocks, _ = self._shapes[name]
        raw = torch.empty(experts, len(range(part, rows, of)), blocks, GGML_BYTES, dtype=torch.uint8)
        for expert in range(experts):
            packed, scales = (each[part::of] for each in self._stored(name, expert))
            nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # [rows, blocks, 32]
            first, second = nibbles.chunk(2, dim=-1)  # GGML: weight j low and j + 16 high
            raw[expert, ..., 0] = scales
            raw[expert, ..., 1:] = first | (second << 4)
        return raw.view(-1)

    def _stored(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """[rows, blocks, 16] and [rows, blocks] of one expert."""
        blocks, scales = (read_some(self._source, name + each, expert, 1)[0] for each in (BLOCKS, SCALES))
        return blocks, scales

    def _checked(self, stack: str, there: set[str]) -> tuple[int, int, int, int]:
        blocks = self._source.info(stack + BLOCKS)
        if stack + SCALES not in there:
            raise BrokenFileError(f"{stack}{SCALES} is missing, without which {stack}{BLOCKS} cannot be decoded.")
        scales = self._source.info(stack + SCALES)
        half = PER_BLOCK // PER_BYTE
        good = len(blocks.shape) == 4 and blocks.shape[3] == half and scales.shape == blocks.shape[:3]
        if not good or {blocks.dtype, scales.dtype} != {"U8"} or not math.prod(blocks.shape):
            raise BrokenFileError(
                f"{stack}: blocks {blocks.dtype} {list(blocks.shape)} and scales {scales.dtype} {list(scales.shape)} "
                f"are no MXFP4: bytes [experts, rows, blocks, {half}] and [experts, rows, blocks]."
            )
        experts, rows, n, _ = blocks.shape
        return experts, rows, n, half
