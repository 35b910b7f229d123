"""A quantized matrix in memory, as the kernels read it, and the way there and back.

The layout is one and the same on every machine, whether or not native code is there, so that stored buffers of one
machine serve on another. Codes are dense: a 4-bit weight takes half a byte. `unpack` gives back exactly what was
packed. The bit patterns are described in docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from whit.grids.grid import Grid
from whit.grids.quantized import QuantizedTensor
from whit.grids.sparse import Sparse
from whit.kernels.form import LANES, QUAD, Form, Kind, buffer_specs, form_of, planes, table_of

# Rows that are rearranged at a time: the temporaries are several times the size of the codes.
CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantized matrix in memory, as the kernels read it.

    grid     of the matrix
    shape    (rows, cols) = (out, in)
    buffers  exactly the entries of `buffer_specs(grid, shape)`: `codes` (uint8, dense bits), the grid's stored
             parameters, and `table` for grids whose levels are a table
    Nothing is checked here, so that a module can make one for every call; `check` does.
    """

    grid: Grid
    shape: tuple[int, int]
    buffers: dict[str, Tensor]

    def __getstate__(self) -> dict[str, object]:
        """Copies do not take along where the buffers are (matmul.py)."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def form(self) -> Form:
        """The numbers that the kernels need."""
        return form_of(self.grid, self.shape)  # torch.compile does not see through cached_property

    @property
    def n_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())

    def check(self) -> None:
        """Raises ValueError when a buffer is missing, has another shape or dtype than its grid states, holds the levels
        of another grid, or names columns that there are not."""
        specs = buffer_specs(self.grid, self.shape)
        if specs.keys() != self.buffers.keys():
            raise ValueError(f"{self.grid} packs into {sorted(specs)}, found {sorted(self.buffers)}")
        for name, spec in specs.items():
            found = self.buffers[name]
            if tuple(found.shape) != spec.shape or found.dtype != spec.dtype:
                raise ValueError(
                    f"{name} of packed {self.grid} must be {spec.dtype} {list(spec.shape)}, "
                    f"found {found.dtype} {list(found.shape)}"
                )
        table = table_of(self.grid) if "table" in specs else None
        if table is not None and not table.equal(self.buffers["table"].cpu()):
            raise ValueError(f"the table of packed {self.grid} holds other levels than the grid has")
        if isinstance(self.grid, Sparse):
            self.grid.check(self.buffers, self.shape[1])


def pack(quantized: QuantizedTensor) -> Packed:
    """The matrix in the order of the kernels. Any grid; those without a kernel stay in plain order, with dense bits."""
    form = form_of(quantized.grid, quantized.shape)
    codes, params = quantized.codes, quantized.params
    if form.kind is Kind.PLAIN:
        buffers = {"codes": _pack_plain(codes, form.bits) if form.bits else codes.contiguous()}
        buffers |= {name: value.contiguous() for name, value in params.items()}
    elif form.kind is Kind.ROWS:
        buffers = {"codes": _pack_rows(codes, form), **{name: value.contiguous() for name, value in params.items()}}
    else:
        buffers = {"codes": _pack_tiles(codes, form)}
        for name, value in params.items():
            spread = value.expand(form.rows, form.groups)  # one value of a whole tensor becomes one of each row
            buffers[name] = _tile_params(spread, form)
        table = table_of(quantized.grid)
        if table is not None:
            buffers["table"] = table
    return Packed(quantized.grid, quantized.shape, buffers)


def unpack(packed: Packed) -> QuantizedTensor:
    """What was packed, bit for bit."""
    form, grid, shape = packed.form, packed.grid, packed.shape
    codes = packed.buffers["codes"]
    spec, schema = grid.code_spec(shape), grid.schema(shape)
    params = {name: packed.buffers[name] for name in schema}
    if form.kind is Kind.PLAIN:
        if form.bits:
            codes = _unpack_plain(codes, spec.shape, spec.dtype)
        return QuantizedTensor(grid, shape, codes.clone(), {name: value.clone() for name, value in params.items()})
    if form.kind is Kind.ROWS:
        codes = unpack_rows(codes, form.cols, form.bits)
        return QuantizedTensor(grid, shape, codes, {name: value.clone() for name, value in params.items()})
    params = {name: untile_params(value, form.rows) for name, value in params.items()}
    params = {name: value[tuple(slice(n) for n in schema[name].shape)].clone() for name, value in params.items()}
    return QuantizedTensor(grid, shape, unpack_tiles(codes, form.rows, form.cols, form.bits), params)


def _pack_tiles(codes: Tensor, form: Form) -> Tensor:
    """[tiles, bytes] uint8: per block of columns the planes one after the other, wide ones first."""
    tiles = max(1, CHUNK // (form.padded * LANES))
    packed = torch.empty(form.tiles, form.padded * form.bits * LANES // 8, dtype=torch.uint8)
    for first in range(0, form.tiles, tiles):
        last = min(first + tiles, form.tiles)
        part = codes[first * LANES : last * LANES]
        padded = codes.new_zeros((last - first) * LANES, form.padded)
        padded[: part.shape[0], : form.cols] = part
        quads = padded.view(last - first, LANES, -1, QUAD).transpose(1, 2)  # [tiles, quads, 16, 4]
        quads = quads.reshape(last - first, -1, form.block // QUAD, LANES * QUAD)  # [tiles, blocks, quads, 64]
        packed[first:last] = torch.cat([_plane(quads, *plane) for plane in planes(form.bits)], -1).flatten(1)
    return packed


def _plane(quads: Tensor, width: int, shift: int) -> Tensor:
    """[tiles, blocks, bytes]: `width` bits from `shift` on of neighbouring quads, side by side in a byte."""
    fields = quads.view(*quads.shape[:2], -1, 8 // width, LANES * QUAD)  # [tiles, blocks, chunks, fields, 64]
    byte = torch.zeros_like(fields[..., 0, :])
    for field in range(8 // width):
        byte |= ((fields[..., field, :] >> shift) & ((1 << width) - 1)) << (width * field)
    return byte.flatten(2)


def unpack_tiles(codes: Tensor, rows: int, cols: int, bits: int) -> Tensor:
    """uint8 codes [rows, cols] from tiles [n_tiles, bytes]."""
    n, block = codes.shape[0], 32 if bits & 1 else 16
    blocks = codes.view(n, -1, block * LANES * bits // 8)  # [tiles, blocks, bytes]
    n_quads = block // QUAD
    quads = codes.new_zeros(n, blocks.shape[1], n_quads, LANES * QUAD)
    start = 0
    for width, shift in planes(bits):
        size = n_quads * LANES * QUAD * width // 8
        plane = blocks[..., start : start + size].reshape(n, blocks.shape[1], -1, 1, LANES * QUAD)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)[:, None]
        fields = (plane >> shifts) & ((1 << width) - 1)  # [tiles, blocks, chunks, fields, 64]
        quads |= fields.view(quads.shape) << shift
        start += size
    matrix = quads.view(n, -1, LANES, QUAD).transpose(1, 2).reshape(n * LANES, -1)
    return matrix[:rows, :cols].contiguous()


def _tile_params(value: Tensor, form: Form) -> Tensor:
    """[tiles, groups, 16] of [rows, groups]; rows beyond the last hold zero bits."""
    raw = value.contiguous().view(_integer(value.dtype))
    padded = raw.new_zeros(form.tiles * LANES, form.groups)
    padded[: form.rows] = raw
    return padded.view(form.tiles, LANES, form.groups).transpose(1, 2).contiguous().view(value.dtype)


def untile_params(value: Tensor, rows: int) -> Tensor:
    """[rows, groups] of [tiles, groups, 16]."""
    raw = value.view(_integer(value.dtype)).transpose(1, 2)
    return raw.reshape(-1, value.shape[1])[:rows].contiguous().view(value.dtype)


def _integer(dtype: torch.dtype) -> torch.dtype:
    """An integer dtype of the same width: not every operator knows 8-bit floats."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]


def _pack_rows(codes: Tensor, form: Form) -> Tensor:
    """[rows, bytes] uint8: per block sixteen bytes whose fields are sixteen columns apart, then single bits; codes of
    eight bits as they are."""
    padded = codes.new_zeros(form.rows, form.padded)
    padded[:, : form.cols] = codes
    if form.bits == 8:
        return padded
    steps = padded.view(form.rows, -1, form.block // LANES, LANES)  # [rows, blocks, steps, 16]
    width = 4 if form.bits == 4 else 2
    low = torch.zeros_like(steps[:, :, 0])
    for step in range(8 // width):
        low |= (steps[:, :, step] & ((1 << width) - 1)) << (width * step)
    if form.bits != 3:
        return low.flatten(1)
    bits = (steps >> 2).view(form.rows, -1, form.block // 8, 8)
    high = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)  # [rows, blocks, 8]
    return torch.cat([low, high], -1).flatten(1)


def unpack_rows(codes: Tensor, cols: int, bits: int) -> Tensor:
    """uint8 codes [rows, cols] from the row form [rows, bytes]."""
    if bits == 8:
        return codes[:, :cols].contiguous()
    rows, width = codes.shape[0], 4 if bits == 4 else 2
    blocks = codes.view(rows, -1, 24 if bits == 3 else 16)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)[:, None]
    steps = (blocks[:, :, None, :16] >> shifts) & ((1 << width) - 1)  # [rows, blocks, steps, 16]
    if bits == 3:
        high = (blocks[:, :, 16:, None] >> torch.arange(8, dtype=torch.uint8, device=codes.device)) & 1
        steps = steps | (high.view(steps.shape) << 2)
    return steps.reshape(rows, -1)[:, :cols].contiguous()


def _pack_plain(codes: Tensor, bits: int) -> Tensor:
    """[n / 8, bits] uint8: eight codes in as many bytes as a code has bits, byte i holding bit i of each."""
    flat = codes.reshape(-1)
    packed = torch.empty(-(-flat.numel() // 8), bits, dtype=torch.uint8)
    place = torch.arange(8, dtype=torch.uint8)
    for first in range(0, packed.shape[0], CHUNK // 8):
        part = flat[first * 8 : first * 8 + CHUNK]
        eights = torch.nn.functional.pad(part, (0, -part.numel() % 8)).view(-1, 8)
        for bit in range(bits):
            ones = ((eights >> bit) & 1).to(torch.uint8)
            packed[first : first + CHUNK // 8, bit] = (ones << place).sum(1, dtype=torch.uint8)
    return packed


def _unpack_plain(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    n = 1
    for size in shape:
        n *= size
    codes = torch.zeros(packed.shape[0], 8, dtype=dtype, device=packed.device)
    eighth = torch.arange(8, dtype=torch.uint8, device=packed.device)
    for bit in range(packed.shape[1]):
        codes |= ((packed[:, bit, None] >> eighth) & 1).to(dtype) << bit
    return codes.view(-1)[:n].view(shape)
