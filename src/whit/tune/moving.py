"""What moves in a model that is trained, and how to put it back.

    scales   scales and minima of every quantized matrix, norms and biases; codes stay
    lora     these, and codes by way of offsets of low rank
    full     these, and every code by its own offset

Matrices that the model has in float stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from whit.errors import ModelError, RecipeError
from whit.grids.grid import Grid
from whit.grids.quantized import QuantizedTensor
from whit.live.learner import Learner
from whit.live.quantize import twins_of
from whit.live.twin import Twin, part

SCALES, LORA, FULL = "scales", "lora", "full"
KINDS = (SCALES, LORA, FULL)
RANK = 16
Own = Sequence[tuple[Learner, list[Twin]]]  # learners, and the twins that multiply with each
Lent = Sequence[tuple[QuantizedTensor, Tensor]]  # what a learner has come to, and its decoded matrix
WANTED = "wanted_before_learning"  # attribute of a model that learns: name of a parameter -> its requires_grad


def learn(
    model: nn.Module, train: str = FULL, rank: int = RANK, seed: int = 0, codes_later: bool = False
) -> list[Learner]:
    """Let a quantized model learn, in place, whether it is frozen or not; what it computes does not change.

    train  one of KINDS
    rank   of the offsets, for "lora"
    codes_later  codes move only once `Learner.free` is called, as where blocks take turns
    Everything that does not move has requires_grad off until `settle`. Returns what learns, tied matrices once.
    Raises RecipeError for another kind, ModelError when nothing is quantized or something learns already.
    """
    if train not in KINDS:
        raise RecipeError(f"There is no way of training called {train!r}. Known: {', '.join(KINDS)}.")
    twins = list(twins_of(model))
    if not twins:
        raise ModelError("Nothing in this model is quantized: quantize(model, ...) first.")
    if any(each.learner is not None for each in twins):
        raise ModelError("This model learns already: settle(model) first.")
    model.__dict__[WANTED] = {name: each.requires_grad for name, each in model.named_parameters()}
    model.requires_grad_(False)
    made: dict[tuple[int, Grid], Learner] = {}
    thawed: dict[int, nn.Parameter] = {}
    held = [twin.frozen if twin.frozen is not None else twin._parameters["weight"] for twin in twins]
    for twin, home in zip(twins, held, strict=True):  # `held` keeps alive what identities are taken of
        key = id(home), twin.grid
        if key not in made:
            chosen = twin.frozen is not None or twin.fixed is not None
            original = None if chosen else twin.matrix.detach().float()
            free = train != SCALES and not codes_later
            start = twin.quantized()  # its scales are the twin's own where those are fixed: files want each tensor once
            start = replace(start, params={name: value.clone() for name, value in start.params.items()})
            made[key] = Learner(start, free, True, original, rank if train == LORA else None, seed)
        if twin.frozen is not None:
            if id(home) not in thawed:
                thawed[id(home)] = nn.Parameter(twin.weight.contiguous(), requires_grad=False)
            twin.thaw(thawed[id(home)])
        twin.learner = made[key]
    for vector in vectors_of(model).values():
        vector.requires_grad_(True)
    return list(made.values())


def settle(model: nn.Module) -> None:
    """What has been learned becomes the model's codes and scales; nothing learns any more.

    Parameters want gradients as they did before `learn`; matrices that were frozen then are parameters like any other.
    """
    settled: list[tuple[Learner, Twin]] = []
    part(model, [twin for twin in twins_of(model) if twin.learner is not None])
    for twin in twins_of(model):
        learner, twin.learner, twin.lent = twin.learner, None, None
        if learner is None:
            continue
        first = next((other for one, other in settled if one is learner), None)
        if first is None:
            twin.fix(learner.quantized())
            settled.append((learner, twin))
        else:
            twin.fix_as(first)
    wanted = model.__dict__.pop(WANTED, None)
    if wanted is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted.get(name, True))


def vectors_of(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Norms and biases by name, shared ones once."""
    found = {name: each for name, each in model.named_parameters() if each.dim() == 1}
    learners = [each.learner for each in twins_of(model) if each.learner is not None]
    own = {id(each) for learner in learners for each in learner.parameters()}
    return {name: each for name, each in found.items() if id(each) not in own}


def borrowers(model: nn.Module, learners: Sequence[Learner]) -> Own:
    """Every learner and the twins that multiply with it."""
    twins = list(twins_of(model))
    return [(one, [each for each in twins if each.learner is one]) for one in learners]


def lent(own: Own, gradients: bool) -> Lent:
    """Layers multiply with what their learners have come to, until `give_back`."""
    made: list[tuple[QuantizedTensor, Tensor]] = []
    for learner, twins in own:
        quantized = learner.quantized()
        Q = quantized.dequantize().requires_grad_(gradients)
        made.append((quantized, Q))
        for twin in twins:
            twin.lent = Q
    return made


def collect(own: Own, made: Lent) -> None:
    """Gradients of what was lent become those of what moves."""
    for (learner, _), (quantized, Q) in zip(own, made, strict=True):
        G = torch.zeros_like(Q) if Q.grad is None else Q.grad
        for value, gradient in zip(learner.moving(), learner.gradients(G, quantized), strict=True):
            value.grad = gradient
        Q.grad = None


def give_back(own: Own) -> None:
    """Nothing is lent any more."""
    for _, twins in own:
        for twin in twins:
            twin.lent = None
