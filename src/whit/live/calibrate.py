"""`calibrate`: fixed scales for activations, from what arrives while the model runs.

    with calibrate(model):
        for batch in batches:
            model(**batch)

While the context lasts, matrices are seen rounded and activations are not; every layer counts the sizes of its inputs.
At its end each gets one scale, chosen as `method` says. `auto` looks at the model's own predictions: it takes the
method whose scales change them least, then gives a scale per token back to layers where a fixed one hurts, the coarsest
first, until predictions are nearly what they are with a scale per token everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from whit.calibration.ranges import RANGES, Histogram, coarseness
from whit.errors import RecipeError
from whit.live.inputs import Inputs
from whit.live.run import Call, divergence, log_probabilities, recorded, steady
from whit.live.smooth import smooth as smoothed

AUTO = "auto"
JUDGED = 2  # calls on whose predictions `auto` decides
WORTH = 0.002  # share of the divergence that a scale per token must save to be given back
SLACK = 1.1  # fixed scales may cost a tenth of what a scale per token everywhere does
UNREAD = "no quantized layer reads it"
METHODS = (*RANGES, AUTO)


@dataclass
class Calibrated:
    """What came out of a calibration; filled when its context ends.

    scales      name of the layer -> what its scale was chosen by, or "per token"
    divergence  method -> mean KL from unrounded activations in nats, where `auto` measured it
    smoothed    number of norms whose outputs were evened out
    """

    scales: dict[str, str] = field(default_factory=dict)
    divergence: dict[str, float] = field(default_factory=dict)
    smoothed: int = 0


@contextmanager
def calibrate(model: nn.Module, method: str = "minmax", smooth: bool = False) -> Iterator[Calibrated]:
    """Fixed scales for all quantized activations of `model`.

    method  minmax, percentile, mse, kl (docs/live.md), or auto
    smooth  first move what sticks out of norms' outputs into the layers after them (SmoothQuant); needs a model that
            is not frozen
    Layers that saw nothing keep a scale per token. Raises RecipeError for another method, when nothing is quantized, or
    within another calibration of the model.
    """
    if method not in METHODS:
        raise RecipeError(f"There is no calibration called {method!r}. Known: {', '.join(METHODS)}.")
    inputs = {name: module for name, module in model.named_modules() if isinstance(module, Inputs)}
    if not inputs:
        raise RecipeError("No activations are quantized in this model: quantize(model, activations=qint8) first.")
    if any(each.observer is not None for each in inputs.values()):
        raise RecipeError("This model is being calibrated already: let that calibration end first.")
    result = Calibrated()
    observe(inputs.values(), True)
    try:
        with recorded(model) as calls:
            yield result
        if not calls and (smooth or method == AUTO):
            raise RecipeError("The model was not called while it was calibrated: nothing can be tried on its inputs.")
        if smooth:
            with torch.no_grad(), steady(model):
                result.smoothed = smoothed(model, calls)
                observe(inputs.values(), True)
                for call in calls:
                    call(model)
        histograms = {name: each.observer for name, each in inputs.items() if each.observer is not None}
    finally:
        observe(inputs.values(), False)
    result.scales |= dict.fromkeys(drop_unread(inputs, histograms), UNREAD)
    if method == AUTO:
        with steady(model):
            _choose(model, inputs, histograms, calls[:JUDGED], result)
        return
    for name, each in inputs.items():
        each.fix(RANGES[method](histograms[name], 8))
        result.scales[name] = method if each.static else "per token"


def observe(inputs: Iterable[Inputs], on: bool) -> None:
    """Count, and round nothing; or stop counting, and round."""
    for each in inputs:
        each.observer, each.enabled = (Histogram(), False) if on else (None, True)


def _choose(
    model: nn.Module,
    inputs: dict[str, Inputs],
    histograms: dict[str, Histogram],
    calls: Sequence[Call],
    result: Calibrated,
) -> None:
    """The method that changes predictions least, less the layers that are better off with a scale per token."""
    for each in inputs.values():
        each.enabled = False
    reference = log_probabilities(model, calls)
    for each in inputs.values():
        each.enabled = True
        each.fix(None)
    result.divergence["per token"] = divergence(model, calls, reference)
    for method, cut in RANGES.items():
        for name, each in inputs.items():
            each.fix(cut(histograms[name], 8))
        result.divergence[method] = divergence(model, calls, reference)
    method = min(RANGES, key=lambda each: result.divergence[each])
    for name, each in inputs.items():
        each.fix(RANGES[method](histograms[name], 8))
        result.scales[name] = method if each.static else "per token"
    now, enough = result.divergence[method], SLACK * result.divergence["per token"]
    for names in sorted(_alike(histograms), key=lambda names: -coarseness(histograms[names[0]], inputs[names[0]].most)):
        if now <= enough:
            break  # the coarsest came first
        kept = {name: inputs[name].scale.clone() for name in names}
        for name in names:
            inputs[name].fix(None)
        then = divergence(model, calls, reference)
        if now - then > WORTH * now:
            now = then
            result.scales |= dict.fromkeys(names, "per token")
            continue
        for name in names:
            inputs[name].restore(kept[name])
    if now > enough:  # what is left hurts together
        for name, each in inputs.items():
            each.fix(None)
            result.scales[name] = "per token"
        now = result.divergence["per token"]
    result.divergence[AUTO] = now


def drop_unread(inputs: dict[str, Inputs], histograms: dict[str, Histogram]) -> list[str]:
    """Take out norms whose outputs no quantized layer is given, such as those of single heads, and fix no scale there.

    Rounding them would cost and save nothing. Returns their names.
    """
    found = []
    for names in _alike(histograms):
        if all(inputs[name].leaving for name in names):
            found += names
    for name in found:
        histograms.pop(name)
        inputs.pop(name).fix(None)
    return found


def _alike(histograms: dict[str, Histogram]) -> list[list[str]]:
    """Layers that saw the same values: a norm's output is what several layers are given."""
    groups: list[list[str]] = []
    for name, histogram in histograms.items():
        for group in groups:
            other = histograms[group[0]]
            if other.most == histogram.most and other.counts.equal(histogram.counts):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups
