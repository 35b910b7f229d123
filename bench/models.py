"""The test model in the forms that the measurements need, made once in bench/work."""

from __future__ import annotations

from pathlib import Path

from bench.peers import WORK
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.models.tokenizer import save_tokenizer
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named

MODEL = "smollm2-135m"


def float_gguf() -> Path:
    """SmolLM2-135M as a float32 GGUF file."""
    path = WORK / "smollm2-f32.gguf"
    if not path.exists():
        write_gguf(open_model(MODEL), recipe_named("f32"), path)
    return path


def float_folder() -> Path:
    """SmolLM2-135M as a Hugging Face folder in float32."""
    folder = WORK / "smollm2-f32"
    if not (folder / "model.safetensors").exists():
        model = open_model(MODEL)
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(model, folder)
        load_module(model).save_pretrained(folder)
    return folder
