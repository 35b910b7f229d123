"""Tensors that would lie on a GPU, counted from a plan, against those that are alive while the same code runs here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alive import Alive
from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.memory import run_bytes
from whit.models.links import Links
from whit.models.open import open_model
from whit.models.stream import BlockStream
from whit.models.taps import watched
from whit.pipeline.folder import plan_model
from whit.pipeline.gpu import job_bytes, result_bytes
from whit.pipeline.inputs import TOGETHER, Inputs
from whit.pipeline.quantize import model_view, plan_gguf
from whit.ranks import ALONE
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.shape import shape_from_config

LENGTH = 128
SIZES = {"hidden_size": 256, "head_dim": 64, "vocab_size": TOY_VOCAB, "max_position_embeddings": LENGTH}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "intermediate_size": 640},
    "llama, mostly vocabulary": {**SIZES, "intermediate_size": 64, "vocab_size": 8192, "num_hidden_layers": 1},
    "mixtral": {**SIZES, "intermediate_size": 320},
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_counted_is_what_lives_while_a_block_is_watched(name: str, tmp_path: Path) -> None:
    save_tiny(name.split(",")[0], tmp_path, **SHAPES[name])
    save_toy_tokenizer("llama", tmp_path)
    model = open_model(tmp_path)
    links, plan = Links(model_view(model)), plan_gguf(model, recipe_named("q4_0", "feedback"))
    stream = BlockStream(model, links.read)
    n = 2 * TOGETHER  # so that some wait while the products of others are there
    ids = torch.tensor(random_tokens(n * LENGTH)).view(n, LENGTH)
    outside = Alive()
    with outside:
        hidden = stream.start(ids)
    here = sum(each.nbytes for each in hidden)  # these stay with the processor
    block = stream.fill(0)
    weights = sum(each.nbytes for each in block.parameters())
    inside, inputs = Alive(), Inputs(stream.prefix(0), 0, ALONE)
    with inside:
        for each in hidden:
            with watched(block, inputs.see):
                stream.run(0, each)
            inputs.forget()
    sums = sum(8 * moments.cols**2 for moments in dict.fromkeys(inputs.moments.values()))  # so do these
    expected = max(outside.peak - here, weights + inside.peak - sums)
    assert job_bytes(model, plan, LENGTH) == pytest.approx(expected, rel=0.1)


def test_a_job_that_runs_no_model_needs_no_gpu(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path)
    assert job_bytes(open_model(tmp_path), plan_gguf(open_model(tmp_path), recipe_named("q4_0", "nearest")), 512) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_of_its_own_stays_with_the_processor_in_llama_cpp(tied: bool, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, vocab_size=TOY_VOCAB, tie_word_embeddings=tied)
    save_toy_tokenizer("llama", tmp_path)
    model = open_model(tmp_path)
    shape = shape_from_config(model.config)
    plan, n_bytes = plan_model(model, recipe_named("q8_0", "nearest"))
    run = run_bytes(n_bytes, shape, 64)
    embedding = math.prod((TOY_VOCAB, shape.hidden)) * 34 // 32  # q8_0
    assert run.total - result_bytes(plan, run) == (0 if tied else embedding)
    recipe = folder_recipe("w8a16", "nearest")
    assert recipe is not None
    plan, n_bytes = plan_model(model, recipe)
    run = run_bytes(n_bytes, shape, 64, runtime="vllm")
    assert result_bytes(plan, run) == run.total
