"""What arrives at a layer, quantized to 8 bits: with one fixed scale, or with one per token.

    x' = scale * clamp(round(x / scale))          int8: codes -127..127;  FP8: the values of E4M3, up to 448

Until `calibrate` has set a scale, every token has its own, max |x| / 127 (or / 448). Gradients pass as if nothing was
rounded, and stop where something was clipped. Source: arXiv 1308.3432 (straight-through), docs/live.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whit.calibration.ranges import Histogram

INT8, FP8 = 127.0, 448.0
KINDS = {"int8": INT8, "fp8": FP8}
TINY = torch.finfo(torch.float32).tiny


class Inputs(nn.Module):
    """Quantizes the inputs of one layer, or the outputs of one norm.

    kind      "int8" or "fp8"
    leaving   whether these are a norm's outputs. With a scale per token they are left as they are: the layers that
              they go to round them by the same rule
    enabled   whether anything is rounded
    observer  counts what arrives, while a calibration lasts
    """

    def __init__(self, kind: str, leaving: bool = False) -> None:
        """One scale per token. Raises ValueError for another kind."""
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"inputs are rounded to {' or '.join(KINDS)}, found {kind!r}")
        self.kind, self.leaving, self.enabled, self.observer = kind, leaving, True, None
        self._static = False
        self.register_buffer("scale", torch.zeros((), dtype=torch.float32))  # zero: one per token

    observer: Histogram | None
    scale: Tensor

    @property
    def static(self) -> bool:
        """Whether there is a fixed scale."""
        return self._static

    @property
    def most(self) -> float:
        """The largest value that a fixed scale holds, 0 without one."""
        return self.scale.item() * KINDS[self.kind]

    def fix(self, most: float | None) -> None:
        """One scale for everything, such that `most` is the largest value; None for one per token."""
        self._static = most is not None and most > 0
        self.scale.fill_(max(most / KINDS[self.kind], TINY) if self._static and most else 0.0)

    def restore(self, scale: Tensor) -> None:
        """The scale that it had."""
        self.scale.copy_(scale)
        self._static = bool(scale > 0)

    def forward(self, x: Any) -> Any:
        """x [..., cols] as the layer sees it, in its own dtype; of a tuple, as some norms return, the first is x."""
        if isinstance(x, tuple):
            return self(x[0]), *x[1:]
        if self.observer is not None:
            self.observer.add(x)
        if not self.enabled or (self.leaving and not self._static):
            return x
        return rounded_inputs(x, self.scale if self._static else None, self.kind)

    @property
    def counts(self) -> bool:
        """Whether products of codes give what `forward` and a product of floats would."""
        return self.enabled and self.kind == "int8" and self.observer is None

    def extra_repr(self) -> str:
        """Such as int8, one scale."""
        return f"{self.kind}, {'one scale' if self._static else 'a scale per token'}"

    def _apply(self, fn: Any, recurse: bool = True) -> Inputs:
        device = fn(torch.empty(0, device=self.scale.device)).device
        if device != self.scale.device:  # never cast
            self.scale = torch.zeros_like(self.scale, device=device) if self.scale.is_meta else self.scale.to(device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.restore(self.scale.clone())


def rounded_inputs(x: Tensor, scale: Tensor | None, kind: str) -> Tensor:
    """x rounded to 8 bits and back, in its own dtype; differentiable.

    x      [..., cols]
    scale  a float32 number, or None for one per token
    kind   "int8" or "fp8"
    """
    high, value = KINDS[kind], x.float()
    if scale is None:
        largest = value.detach().abs().amax(-1, keepdim=True)
        scale = torch.where(largest > 0, largest / high, 1.0)
    inside = (value / scale).clamp(-high, high)  # gradients stop beyond
    with torch.no_grad():
        nearest = inside.round() if kind == "int8" else inside.to(torch.float8_e4m3fn).float()
    through = inside + (nearest - inside).detach() if x.requires_grad else nearest
    return (through * scale).to(x.dtype)
