"""Second moments of what arrives at a linear layer: H = sum of x x^T over calibration tokens.

One object serves every purpose: its whole is the loss of error feedback, its diagonal an importance matrix. With the
inputs of the original model beside those of the quantized prefix it also holds C = sum of (x_original - x) x^T, from
which the target that makes up for earlier layers' errors follows (docs/rounding.md).

Products are made in float32 per batch and added in float64. A float32 product has 24 significant bits and float64
has 53, so the sum does not depend on the order of batches unless their magnitudes differ by more than 2^29.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.errors import BadWeightsError

MAX_LOST = 0.001  # share of tokens with NaN or infinite inputs above which the statistics are refused


class Moments:
    """Second moments of one linear's inputs, accumulated batch by batch.

    n_tokens  tokens that were counted
    n_lost    tokens dropped because an input was NaN or infinite
    """

    def __init__(self, cols: int, shifted: bool = False) -> None:
        """cols  inputs of the layer; shifted  whether `add` is also given the original model's inputs."""
        self.n_tokens, self.n_lost = 0, 0
        self._sum = torch.zeros(cols, cols, dtype=torch.float64)
        self._shift = torch.zeros(cols, cols, dtype=torch.float64) if shifted else None

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Count a batch.

        x         [tokens, cols] float   inputs in the partly quantized model
        original  [tokens, cols] float   inputs of the same tokens in the original model
        """
        x = x.float()
        finite = torch.isfinite(x).all(1)
        if not finite.all():
            self.n_lost += int((~finite).sum())
            x, original = x[finite], None if original is None else original[finite]
        self.n_tokens += x.shape[0]
        self._sum += x.T @ x
        if self._shift is not None and original is not None:
            self._shift += (original.float() - x).T @ x

    @property
    def H(self) -> Tensor:
        """[cols, cols] float64, mean of x x^T."""
        return self._sum / max(1, self.n_tokens)

    @property
    def C(self) -> Tensor | None:
        """[cols, cols] float64, mean of (x_original - x) x^T, or None."""
        return None if self._shift is None else self._shift / max(1, self.n_tokens)

    @property
    def importance(self) -> Tensor:
        """[cols] float32, mean squared input: what an importance matrix holds."""
        return self.H.diagonal().float()

    @property
    def n_dead(self) -> int:
        """Inputs that were zero for every token."""
        return int((self._sum.diagonal() == 0).sum())

    def check(self, name: str) -> None:
        """Raise BadWeightsError when too many tokens of `name` were lost."""
        total = self.n_tokens + self.n_lost
        if self.n_lost > MAX_LOST * total:
            raise BadWeightsError(
                f"{name}: {self.n_lost} of {total} calibration tokens gave NaN or infinite inputs. The model overflows "
                "or is damaged; try another calibration text, or --rounding nearest, which needs none."
            )


def target_shift(H: Tensor, C: Tensor, damping: float) -> Tensor:
    """S [cols, cols] float32: W + W S on the quantized prefix's inputs comes nearest to W on the original ones.

    S = C (H + damping * mean(diag H))^-1; a part of the way is W + strength * W S.
    H, C  [cols, cols] float64
    Source: arXiv 2504.09629 (QEP), arXiv 2504.02692 (GPTAQ), arXiv 2505.11695 (Qronos): one target, three routes.
    """
    mean = H.diagonal().mean()
    if mean <= 0:
        return torch.zeros(H.shape)
    damped = H + damping * mean * torch.eye(H.shape[0], dtype=H.dtype)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        return torch.zeros(H.shape)  # a target that cannot be found is not shifted
    return torch.cholesky_solve(C.T, factor).T.float()  # H_d is symmetric
