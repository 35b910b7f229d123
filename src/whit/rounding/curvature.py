"""The quadratic loss of one linear layer, ready for rounding: its matrix, damped, and the factor of it.

The loss of replacing W by Q is E = sum over rows of (Q - W) H (Q - W)^T with H = X X^T / N. Adding
lambda |Q - W|^2 ("damping") makes H invertible and keeps Q near W where the calibration text says little.

With H = R R^T, R upper triangular, rounding columns from left to right and letting the later ones answer for the
errors of the earlier ones is Babai's nearest plane; R[i, i]^2 is what an error in column i costs once all later
columns have adapted. Source: arXiv 2210.17323 (GPTQ), arXiv 2507.18553; the pull form in docs/rounding.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of H's diagonal
LADDER = (1.0, 10.0, 100.0, 1000.0, 10000.0)
SMALLEST = 1e-6  # of the mean diagonal: where eigenvalues are cut when no damping helps


@dataclass(frozen=True)
class Curvature:
    """The damped second moments of a layer's inputs and their factor.

    H     [cols, cols] float32, damped
    R     [cols, cols] float32, upper triangular, H = R R^T
    note  what had to be done beyond the usual damping, else empty
    """

    H: Tensor
    R: Tensor
    note: str = ""

    def rescaled(self, t: Tensor, damping: float = DAMPING) -> Curvature:
        """The loss for weights whose columns were multiplied with t [cols] and inputs divided by it.

        It is damped again, in the new scale: what kept weights near in the old one means next to nothing to a column
        that has grown a hundredfold, and its target would run away (docs/rounding.md).
        """
        again = curvature(self.H / t[:, None] / t, damping)
        return replace(again, note=self.note or again.note)


def curvature(H: Tensor, damping: float = DAMPING) -> Curvature:
    """Damp and factor H [cols, cols]; what is not positive definite is helped until it is.

    Steps: damping, ten times as much and so on, eigenvalues cut from below, the diagonal alone.
    Raises ValueError when H is not finite.
    """
    H = H.double()
    if not torch.isfinite(H.sum()):
        raise ValueError("second moments are not finite")
    mean = H.diagonal().mean().item()
    if mean <= 0:  # nothing ever arrived here: all weights count the same
        eye = torch.eye(H.shape[0])
        return Curvature(eye, eye, "no input was ever active: plain squared error")
    backwards = H.flip(0, 1)  # the largest thing there is, three times here at most: H, this, its factor
    own = backwards.diagonal().clone()
    for factor in LADDER:
        backwards.diagonal().copy_(own + damping * factor * mean)
        R = _backwards_factor(backwards)
        if R is not None:
            damped = H.float()
            damped.diagonal().copy_(backwards.diagonal().flip(0))
            note = "" if factor == 1 else f"second moments needed {factor:g} times the usual damping"
            return Curvature(damped, R, note)
    del backwards
    values, vectors = torch.linalg.eigh((H + H.T) / 2)
    clipped = (vectors * values.clamp(min=SMALLEST * mean)) @ vectors.T
    R = _backwards_factor(clipped.flip(0, 1))
    if R is not None:
        return Curvature(clipped.float(), R, "second moments needed their eigenvalues cut")
    diagonal = H.diagonal().clamp(min=0) + damping * mean
    return Curvature(diagonal.diag().float(), diagonal.sqrt().diag().float(), "only the diagonal of H could be used")


def _backwards_factor(H: Tensor) -> Tensor | None:
    """Upper triangular R float32 with R R^T = H: the Cholesky factor of H backwards, read backwards.

    H  with rows and columns backwards
    None when it is not definite.
    """
    L, info = torch.linalg.cholesky_ex(H)
    if info.item() or not torch.isfinite(L.sum()):
        return None
    return L.float().flip(0, 1)
