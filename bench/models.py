"""The test model in the forms that the measurements need, made once in bench/work, and wide ones of random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.peers import WORK
from bench.small_model import VOCABULARY, tokenizer_of
from whit.calibration.text import default_text, documentation_text, windows
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.models.tokenizer import load_tokenizer, save_tokenizer
from whit.pipeline.convert import convert
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


@dataclass(frozen=True)
class Inputs:
    """What tools that read one text are given.

    name    of the model, for file names
    folder  the model in float32
    tokens  a safetensors file with `tokens` [windows, 512], to calibrate and to train on
    ids     [windows, 512] int64 of held-out text
    """

    name: str
    folder: Path
    tokens: Path
    ids: Tensor


def inputs(model: str, samples: int, reported: int) -> Inputs:
    """Made in bench/work where they are not there yet."""
    opened, name = open_model(model), Path(model).name
    folder, tokens = WORK / f"{name}-f32", WORK / f"{name}.tokens.safetensors"
    WORK.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        convert(opened, "f32", folder, requantize=False)
    tokenizer = load_tokenizer(opened)
    docs = windows(tokenizer.encode(documentation_text("calibration").content), limit=samples)
    save_file({"tokens": docs.contiguous()}, tokens)
    return Inputs(name, folder, tokens, windows(tokenizer.encode(default_text().content), limit=reported))


def wide_folder(layers: int) -> Path:
    """A Llama of width 2048 with random weights in bfloat16: for time and memory, which weights do not change."""
    folder = WORK / f"wide-{layers}"
    if not (folder / "config.json").exists():
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
        torch.manual_seed(0)
        tokenizer_of([documentation_text("calibration").content]).save_pretrained(folder)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def wide_gguf(layers: int) -> Path:
    """The same as a float32 GGUF file."""
    path = WORK / f"wide-{layers}-f32.gguf"
    if not path.exists():
        write_gguf(open_model(str(wide_folder(layers))), recipe_named("f32"), path)
    return path
