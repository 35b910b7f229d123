"""Integer grids whose columns name their group: GPTQ's act-order with a group index.

    value[r, c] = scale[r, g[c]] * (level - zero[r, g[c]])

Such files are read and written back; nothing is rounded to them by choice, because the same gain comes without an
index (docs/rounding.md), and runtimes are faster without one. Groups may be of unequal size, the last one most often.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.grid import Params, Spec
from whit.grids.scaled import Offset, PerGroup, Scaled

INDEX = "g_idx"


@dataclass(frozen=True)
class Indexed:
    """A grouped integer grid with a group index.

    base  the grid of every group; its scheme is per group
    """

    base: Scaled

    def __post_init__(self) -> None:
        if not isinstance(self.base.scheme, PerGroup) or self.base.offset is Offset.MINIMUM:
            raise ValueError(f"a group index needs groups with scales and zero points, found {self.base}")

    @property
    def size(self) -> int:
        """Columns of a group but for the last."""
        assert isinstance(self.base.scheme, PerGroup)
        return self.base.scheme.size

    @property
    def step(self) -> int:
        """One code per weight."""
        return 1

    @property
    def row_independent(self) -> bool:
        """All rows have the same index."""
        return False

    def spans(self, cols: int) -> tuple[int, ...]:
        """The columns of a group may be anywhere in the row."""
        return (cols,)

    def bits_per_weight(self, cols: int) -> float:
        """As without an index, whose four bytes a column are not counted to the rows."""
        n = -(-cols // self.size)
        scale_bits = torch.finfo(self.base.scale_dtype).bits
        zero_bits = self.base.levels.bits if self.base.offset is Offset.ZERO_POINT else 0
        return self.base.levels.bits + n * (scale_bits + zero_bits) / cols

    def code_spec(self, shape: tuple[int, int]) -> Spec:
        """uint8, one code per weight."""
        return Spec(shape, torch.uint8)

    def schema(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """`scale` and, by offset, `zero` (uint8) [rows, groups], and `g_idx` [cols] int32."""
        rows, cols = shape
        blocks = (rows, -(-cols // self.size))
        schema = {"scale": Spec(blocks, self.base.scale_dtype), INDEX: Spec((cols,), torch.int32)}
        if self.base.offset is Offset.ZERO_POINT:
            schema["zero"] = Spec(blocks, torch.uint8)
        return schema

    def fit(self, W: Tensor) -> Params:
        """Groups of neighbours."""
        return self._neighbours(W, self.base.fit(self._padded(W)))

    def search(self, W: Tensor, weights: Tensor | None) -> Params:
        """Groups of neighbours."""
        importance = None if weights is None else self._padded(weights.expand_as(W))
        return self._neighbours(W, self.base.search(self._padded(W), importance))

    def store(self, params: Params) -> Params:
        """As the base does. Raises OverflowError."""
        index = {INDEX: params[INDEX]}
        return {**self.base.store({name: each for name, each in params.items() if name != INDEX}), **index}

    def round(self, W: Tensor, params: Params, weights: Tensor | None = None) -> Tensor:
        """uint8 codes [rows, cols] nearest to W."""
        scale, zero = self._of_columns(params)
        inverse = scale.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        x = W * inverse
        return self.base.levels.nearest(x if zero is None else x + zero)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """[rows, cols] float32."""
        scale, zero = self._of_columns(params)
        levels = self.base.levels.values(codes)
        return scale * (levels if zero is None else levels - zero)

    def _of_columns(self, params: Params) -> tuple[Tensor, Tensor | None]:
        index = params[INDEX].long()
        zero = params["zero"].float()[:, index] if "zero" in params else None
        return params["scale"].float()[:, index], zero

    def _padded(self, W: Tensor) -> Tensor:
        return torch.nn.functional.pad(W, (0, -W.shape[1] % self.size))

    def _neighbours(self, W: Tensor, params: Params) -> Params:
        return {**params, INDEX: torch.arange(W.shape[1], dtype=torch.int32) // self.size}
