"""Codes trained block by block: every block learns to give what the original's block gives, on what it is really given.

    loss of a block = mean over tokens of d^T M d / (|original|^2 + their median),   d = block(x) - original block(x0)

M says what an error of a hidden state does to the model's predictions (metric.py). x are the hidden states behind the
blocks that are finished, x0 the original's own. What one code does to the output of its block is seen far more clearly
than what it does to the model's predictions: the same number of steps moves codes to better places here, where end to
end it moves them to and fro. Tokens of enormous hidden states count like others.

A block is kept as it was when it did not get better on windows that were not trained on.
Source: arXiv 2407.11062 (EfficientQAT, block-wise training of all parameters); arXiv 2309.05516 (AutoRound).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from whit.live.chain import called, chain_of, finished, states_of
from whit.live.run import Call
from whit.tune.adam import Adam
from whit.tune.halves import Halves, fast
from whit.tune.metric import metrics
from whit.tune.moving import Own, collect, give_back, lent

AT_ONCE = 4  # windows per forward pass that is not trained on


class Blocks:
    """The chains of a quantized model that learns and of its original.

    n  how many blocks; 0 for a model without a chain
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, ids: Tensor, n_held: int, seed: int = 0) -> None:
        """ids   [windows, length] int64, those that are not trained on first
        seed  of the metric
        """
        self._ids, self._n_held, self._seed = ids, n_held, seed
        call = Call((ids[:1],), {})
        self._chain = chain_of(model, call)
        self.n = 0
        if self._chain is None:
            return
        name = next(name for name, each in model.named_modules() if each is self._chain)
        theirs = dict(teacher.named_modules()).get(name)
        if not isinstance(theirs, nn.ModuleList) or len(theirs) != len(self._chain):
            return
        self.n, self._theirs, self._teacher = len(theirs), theirs, teacher
        self._metrics: list[Tensor] = []
        self._arguments = [
            states_of(model if own else teacher, each, [call]).calls[0].arguments
            for own, each in ((True, self._chain), (False, theirs))
        ]
        # Hidden states are kept in float32, whatever the models are in.
        self._reached, self._original = (
            [states_of(_body(whole), chain, [Call((each[None],), {})]).calls[0].hidden.float() for each in ids]
            for whole, chain in ((model, self._chain), (teacher, theirs))
        )

    @property
    def originals(self) -> list[nn.Module]:
        """The original's."""
        return list(self._theirs)

    def learners(self, index: int, borrowers: Own) -> Own:
        """Those whose matrices are all in one block."""
        assert self._chain is not None
        inside = {id(each) for each in self._chain[index].modules()}
        return [(one, twins) for one, twins in borrowers if all(id(each) in inside for each in twins)]

    def train(
        self,
        index: int,
        own: Own,
        adam: Adam | None,
        steps: int,
        batch: int,
        seed: int,
    ) -> tuple[float, float]:
        """Train one block and go on to the next; its loss on other windows before and after.

        index  of the blocks in turn: hidden states move on with every call
        adam  of what moves in it; None only goes on
        """
        assert self._chain is not None
        block = self._chain[index]
        self.follow(index)
        before = after = 0.0
        if adam is not None and own:
            weights = self._weights()
            if not self._metrics:
                self._metrics = metrics(Halves(self._teacher), self.originals, self._ids[self._n_held :], self._seed)
            before = self._loss(block, index, own, weights)
            kept = [value.detach().clone() for learner, _ in own for value in learner.moving()]
            order = torch.Generator().manual_seed(seed + index)
            n = len(self._reached) - self._n_held
            for step in range(steps):
                chosen = (torch.randperm(n, generator=order)[:batch] + self._n_held).tolist()
                self._gradients(block, index, own, chosen, weights)
                adam.step(step, steps)
            after = self._loss(block, index, own, weights)
            if not after < before:
                after = before
                for value, old in zip((v for learner, _ in own for v in learner.moving()), kept, strict=True):
                    value.data.copy_(old)
        with torch.no_grad(), fast(self._ids.device):
            lent(own, False)
            self._advance(self._reached, block, 0, index)
            give_back(own)
        return before, after

    def follow(self, index: int) -> None:
        """Go on to the next block with the original alone."""
        self._advance(self._original, self._theirs[index], 1, index)

    def rest(self) -> None:
        """The model has learned: only the original is asked about from now on."""
        self._reached.clear()

    def finished(self, window: int, call: Callable[[], Tensor]) -> Tensor:
        """What a call of the original comes to for a window, once all its blocks have been gone through."""
        return finished(self._theirs, self._fitting(self._original[window]), call)

    def _gradients(self, block: nn.Module, index: int, own: Own, chosen: list[int], weights: list[Tensor]) -> None:
        """Those of the loss of some windows, up to a factor that Adam does not see."""
        made = lent(own, True)
        x = torch.cat([self._reached[n] for n in chosen])
        with torch.enable_grad(), fast(self._ids.device):
            out = called(block, self._arguments[0][index], x)
        off = out.detach().float() - torch.cat([self._original[n] for n in chosen])
        off = off @ self._metrics[index]
        off *= torch.cat([weights[n] for n in chosen])[..., None]
        out.backward(off.to(out.dtype))
        collect(own, made)
        give_back(own)

    def _loss(self, block: nn.Module, index: int, own: Own, weights: list[Tensor]) -> float:
        lent(own, False)
        total = 0.0
        with torch.no_grad(), fast(self._ids.device):
            for n in range(self._n_held):
                off = called(block, self._arguments[0][index], self._reached[n]).float() - self._original[n]
                total += ((off @ self._metrics[index] * off).sum(-1) * weights[n]).mean().item()
        give_back(own)
        return total / max(1, self._n_held)

    def _weights(self) -> list[Tensor]:
        """[1, length] of every window: one over the size of the token's target."""
        sizes = [each.float().square().sum(-1) for each in self._original]
        median = torch.cat(sizes).median()
        return [1 / (each + median) for each in sizes]

    def _advance(self, hidden: list[Tensor], block: nn.Module, whose: int, index: int) -> None:
        """Every window behind the block, in place."""
        for at in range(0, len(hidden), AT_ONCE):
            some = slice(at, at + AT_ONCE)
            hidden[some] = self._called(block, whose, index, torch.cat(hidden[some])).split(1)

    def _called(self, block: nn.Module, whose: int, index: int, hidden: Tensor) -> Tensor:
        with torch.no_grad(), fast(self._ids.device):
            given = self._fitting(hidden) if whose else hidden  # matrices are lent to the model's own in float32
            return called(block, self._arguments[whose][index], given).float()

    def _fitting(self, hidden: Tensor) -> Tensor:
        """In the dtype of the original's matrices, where nothing else casts what they multiply."""
        if torch.is_autocast_enabled(hidden.device.type):
            return hidden
        return hidden.to(next(each.dtype for each in self._theirs.parameters()))


def _body(model: nn.Module) -> nn.Module:
    """The model without its head, where it has one that takes time."""
    return cast(Any, model).get_decoder() if isinstance(model, PreTrainedModel) else model
