"""Float formats as grids: a code is the stored float itself, and there are no parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.grids.grid import Params, Spec


@dataclass(frozen=True)
class Float:
    """The values of one floating-point dtype: float32, float16 or bfloat16."""

    dtype: torch.dtype

    @property
    def step(self) -> int:
        """One code per weight."""
        return 1

    @property
    def row_independent(self) -> bool:
        """Every weight stands alone."""
        return True

    def spans(self, cols: int) -> tuple[int, ...]:
        """Nothing is shared; any width will do."""
        return (1,)

    def bits_per_weight(self, cols: int) -> float:
        """32 or 16."""
        return float(torch.finfo(self.dtype).bits)

    def code_spec(self, shape: tuple[int, int]) -> Spec:
        """The float itself."""
        return Spec(shape, self.dtype)

    def schema(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """No parameters."""
        return {}

    def fit(self, W: Tensor) -> Params:
        """No parameters."""
        return {}

    def search(self, W: Tensor, weights: Tensor | None) -> Params:
        """No parameters, so nothing to search."""
        return {}

    def store(self, params: Params) -> Params:
        """No parameters."""
        return {}

    def round(self, W: Tensor, params: Params, weights: Tensor | None = None) -> Tensor:
        """Round to nearest even. Raises OverflowError when a finite weight becomes infinite."""
        codes = W.to(self.dtype)
        if self.dtype == torch.float16 and not torch.isfinite(codes).all():
            raise OverflowError(f"a weight of {W.abs().max():.6g} does not fit float16 (largest 65504)")
        return codes

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Exact in float32."""
        return codes.to(torch.float32)
