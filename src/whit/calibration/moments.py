"""Second moments of what arrives at a linear layer: H = sum of x x^T over calibration tokens.

One object serves every purpose: its whole is the loss of error feedback, its diagonal an importance matrix. With the
inputs of the original model beside those of the quantized prefix it also holds C = sum of (x_original - x) x^T, from
which the target that makes up for earlier layers' errors follows (docs/rounding.md).

Products are made in float32, of one or a few batches. Sums are in float64: of the products one by one, or of shares of
them that were added in float32 before, which a run may have made in several processes (ranks.py) and which are added in
the order of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.errors import BadWeightsError

ENOUGH = 4  # tokens per input from which on an expert's own moments are enough
UNSEEN = "no calibration token came here: moments of the other experts"
THIN = f"fewer than {ENOUGH} tokens per input: backed by the other experts' moments"
MAX_LOST = 0.001  # share of tokens with NaN or infinite inputs above which the statistics are refused


@dataclass(frozen=True)
class Share:
    """Sums of some batches, [cols, cols] float32 or float64; None when there were none.

    own, shift  of x x^T and of (x_original - x) x^T
    """

    own: Tensor | None
    shift: Tensor | None


class Moments:
    """Second moments of one linear's inputs, accumulated batch by batch.

    cols      how many inputs there are
    shifted   whether those of the original model are known too
    n_tokens  tokens that were counted
    n_lost    tokens dropped because an input was NaN or infinite
    note      what was unusual about them, else empty
    """

    def __init__(self, cols: int, shifted: bool = False, kept: int = 0) -> None:
        """For `cols` inputs.

        shifted  whether `add` is also given the original model's inputs
        kept     tokens of every batch to keep as they are
        """
        self.cols, self.shifted = cols, shifted
        self._kept, self._tokens = kept, list[Tensor]()
        self.n_tokens, self.n_lost, self.note = 0, 0, ""
        self._backing = 0.0  # tokens that were not counted here but stand behind the sum
        self._sum = torch.zeros(cols, cols, dtype=torch.float64)
        self._shift = torch.zeros(cols, cols, dtype=torch.float64) if shifted else None
        self._waiting: list[tuple[Tensor, Tensor | None]] = []  # batches that are in no product yet
        self._share = Share(None, None)  # products that are not in the sums yet

    @classmethod
    def of_importance(cls, mean: Tensor, n_tokens: int) -> Moments:
        """What an importance matrix knows: mean squared inputs [cols], nothing of what they have in common."""
        moments = cls(0)
        moments.n_tokens, moments._sum = n_tokens, (mean.double() * n_tokens).diag()
        return moments

    @classmethod
    def of_saved(cls, counts: Sequence[int], tensors: Mapping[str, Tensor]) -> Moments:
        """What `saved` gave."""
        moments = cls(0)
        moments.n_tokens, moments.n_lost = counts
        moments._sum = tensors["sum"].double()
        moments._tokens = [tensors["tokens"]] if "tokens" in tensors else []
        return moments

    def saved(self) -> tuple[tuple[int, int], dict[str, Tensor]]:
        """Counts and tensors to make them again from; the sum [cols, cols] as float32, half the room.

        Without C: this is for the original model's inputs, which have nothing beside them.
        """
        tensors = {"sum": self._total().float()}
        return (self.n_tokens, self.n_lost), tensors | ({} if self.tokens is None else {"tokens": self.tokens})

    def backed_by(self, others: Tensor, weight: float, note: str) -> Moments:
        """These moments with `others` [cols, cols] (a mean of x x^T) counted as `weight` further tokens."""
        backed = Moments(0)
        backed.n_tokens, backed.n_lost, backed.note = self.n_tokens, self.n_lost, note
        backed._sum, backed._backing = self._total() + weight * others, weight
        return backed

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Count a batch.

        x         [tokens, cols] float   on any device; inputs in the partly quantized model
        original  [tokens, cols] float   inputs of the same tokens in the original model
        """
        x = x.to(torch.float32, copy=True)  # the model may go on to change its own
        if not torch.isfinite(x.sum()):
            finite = torch.isfinite(x).all(1)
            self.n_lost += int((~finite).sum())
            x, original = x[finite], None if original is None else original[finite]
        self.n_tokens += x.shape[0]
        if self._kept and x.shape[0]:
            some = torch.linspace(0, x.shape[0] - 1, min(self._kept, x.shape[0])).round().long()
            self._tokens.append(x[some].cpu())
        self._waiting.append((x, None if original is None else original.float() - x))

    def multiply(self) -> None:
        """Put the batches that came since the last time into the share, as one product."""
        if self._waiting:
            x = torch.cat([batch for batch, _ in self._waiting])
            shifts = [shift for _, shift in self._waiting if shift is not None]
            self._waiting.clear()
            own, shift = self._share.own, self._share.shift
            own = x.T @ x if own is None else own.addmm_(x.T, x)
            if shifts:
                moved = torch.cat(shifts).T
                shift = moved @ x if shift is None else shift.addmm_(moved, x)
            self._share = Share(own, shift)

    def share(self) -> Share:
        """What came since the last share, taken out of here; on the CPU, wherever it was computed."""
        self.multiply()
        own, shift = self._share.own, self._share.shift
        self._share = Share(None, None)
        return Share(None if own is None else own.cpu(), None if shift is None else shift.cpu())

    def put(self, share: Share) -> None:
        """Add a share to the sums. Their order matters where magnitudes differ by more than 2^29: a share has 24
        significant bits, a float64 sum 53.
        """
        if share.own is not None:
            self._sum += share.own
        if share.shift is not None and self._shift is not None:
            self._shift += share.shift

    def counted(self, n_tokens: int, n_lost: int, tokens: Tensor | None) -> None:
        """Count what was counted elsewhere; its sums come by `put`. tokens: those of it that were kept."""
        self.n_tokens += n_tokens
        self.n_lost += n_lost
        if tokens is not None:
            self._tokens.append(tokens)

    def sums(self) -> Share:
        """What has been added up, in float64."""
        return Share(self._sum, self._shift)

    def settle(self) -> None:
        """Put the batches that came since the last time into the sums, as one product where none was made before."""
        self.put(self.share())

    def _total(self) -> Tensor:
        self.settle()
        return self._sum

    @property
    def H(self) -> Tensor:
        """[cols, cols] float64, mean of x x^T."""
        return self._total() / max(1, self.n_tokens + self._backing)

    @property
    def tokens(self) -> Tensor | None:
        """[n, cols] float32, the inputs that were kept, or None."""
        return torch.cat(self._tokens) if self._tokens else None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known."""
        return self.n_tokens + self._backing == 0

    @property
    def C(self) -> Tensor | None:
        """[cols, cols] float64, mean of (x_original - x) x^T, or None."""
        self.settle()
        return None if self._shift is None else self._shift / max(1, self.n_tokens)

    @property
    def importance(self) -> Tensor:
        """[cols] float32, mean squared input: what an importance matrix holds."""
        return self.H.diagonal().float()

    @property
    def n_dead(self) -> int:
        """Inputs that were zero for every token."""
        return int((self._total().diagonal() == 0).sum())

    def check(self, name: str) -> None:
        """Raise BadWeightsError when too many tokens of `name` were lost."""
        total = self.n_tokens + self.n_lost
        if self.n_lost > MAX_LOST * total:
            raise BadWeightsError(
                f"{name}: {self.n_lost} of {total} calibration tokens gave NaN or infinite inputs. The model overflows "
                "or is damaged; try another calibration text, or --rounding nearest, which needs none."
            )


def pooled(experts: Sequence[Moments | None]) -> list[Moments | None]:
    """The moments of a layer's experts, those of experts that saw few tokens shrunk towards the mean of all.

    The mean counts as many tokens as there are inputs: (n H_e + cols H_mean) / (n + cols). An expert with at least
    four tokens per input keeps its own.
    """
    seen = [each for each in experts if each is not None and each.n_tokens]
    if not seen:
        return list(experts)
    mean = torch.zeros_like(seen[0]._total())
    for some in seen:  # one after the other: there may be hundreds, of a gigabyte each
        mean += some._total()
    mean /= sum(each.n_tokens for each in seen)
    cols = mean.shape[0]
    backed: list[Moments | None] = []
    for each in experts:
        n = 0 if each is None else each.n_tokens
        if each is not None and n >= ENOUGH * cols:
            backed.append(each)
            continue
        backed.append((each or Moments(cols)).backed_by(mean, float(cols), THIN if n else UNSEEN))
    return backed


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
