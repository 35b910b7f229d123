"""Whit: make GPT-family language models small and fast with the least possible damage.

    from whit import compare, open_model, recipe_named, write_gguf
    model = open_model("smollm2-135m")
    write_gguf(model, recipe_named("q8_0"), Path("small.gguf"))

Names are imported on first use, so that `import whit` is instant and nothing heavy loads unasked.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

_HOMES = {
    "Comparison": "whit.evaluation.divergence",
    "GRIDS": "whit.grids.named",
    "Model": "whit.models.model",
    "QuantizedTensor": "whit.grids.quantized",
    "Recipe": "whit.recipes.recipe",
    "Rule": "whit.recipes.recipe",
    "WhitError": "whit.errors",
    "compare": "whit.evaluation.compare",
    "generate": "whit.runtime.generate",
    "nearest": "whit.rounding.nearest",
    "open_model": "whit.models.open",
    "recipe_named": "whit.recipes.named",
    "search": "whit.rounding.nearest",
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
