"""Whit: make GPT-family language models small and fast with the least possible damage.

    from whit import compare, open_model, recipe_named, write_gguf
    model = open_model("smollm2-135m")
    write_gguf(model, recipe_named("q8_0"), Path("small.gguf"))

    from whit import calibrate, freeze, qint8, quantize
    quantize(module, weights=qint8, activations=qint8)
    with calibrate(module): ...
    freeze(module)

Names are imported on first use, so that `import whit` is instant and nothing heavy loads unasked.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

_HOMES = {
    "Calibrated": "whit.live.calibrate",
    "Comparison": "whit.evaluation.divergence",
    "GRIDS": "whit.grids.named",
    "Model": "whit.models.model",
    "QuantizedCache": "whit.live.cache",
    "QuantizedTensor": "whit.grids.quantized",
    "QuantizedTraining": "whit.tune.trainer",
    "Recipe": "whit.recipes.recipe",
    "Rule": "whit.recipes.recipe",
    "Tuning": "whit.tune.train",
    "WhitError": "whit.errors",
    "calibrate": "whit.live.calibrate",
    "compare": "whit.evaluation.compare",
    "fp4": "whit.live.types",
    "freeze": "whit.live.quantize",
    "generate": "whit.runtime.generate",
    "grouped": "whit.live.types",
    "load": "whit.live.save",
    "mxfp4": "whit.live.types",
    "nearest": "whit.rounding.nearest",
    "nf4": "whit.live.types",
    "nvfp4": "whit.live.types",
    "open_model": "whit.models.open",
    "qfloat8": "whit.live.types",
    "qint2": "whit.live.types",
    "qint3": "whit.live.types",
    "qint4": "whit.live.types",
    "qint8": "whit.live.types",
    "quantize": "whit.live.quantize",
    "recipe_named": "whit.recipes.named",
    "save": "whit.live.save",
    "search": "whit.rounding.nearest",
    "train": "whit.tune.train",
    "write_gguf": "whit.pipeline.quantize",
}

__all__ = [*_HOMES]
__version__ = version("whit")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'whit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
