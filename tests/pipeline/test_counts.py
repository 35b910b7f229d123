"""What is counted from a plan against what happens in real runs of small models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import whit.models.stream
import whit.pipeline.folding
import whit.pipeline.rounder
from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import RecipeError
from whit.models.open import open_model
from whit.pipeline.counts import Survey, Text, calibrated_work, job_work
from whit.pipeline.duration import CHECK, FACTOR, LONE_FACTOR, NOTHING, PASS, READ, SAMPLE, SLOW_PASS, STEP, WRITE
from whit.pipeline.effort import Calibration, Preset
from whit.pipeline.folder import plan_model
from whit.pipeline.quantize import model_view, plan_gguf, write_gguf
from whit.pipeline.speed import Machine
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.rounding.curvature import Curvature
from whit.rounding.methods import Effort

N, LENGTH = 3, 32
FAST = Preset(N, "docs", 0.0, Effort(sweeps=1))


def saved(kind: str, folder: Path, **changes: object) -> Path:
    save_tiny(kind, folder, vocab_size=TOY_VOCAB, **changes)
    save_toy_tokenizer("gpt2" if kind.startswith("gpt") else "llama", folder)
    return folder


@pytest.fixture
def alone() -> Any:
    """One thread: what forked processes do is not seen here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["llama", "llama-tied-biased", "gpt2", "qwen3_moe"])
def test_counts_are_those_of_a_real_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    model = open_model(saved(kind, tmp_path / "model"))
    recipe = recipe_named("q4_0", "feedback")
    seen: Counter[str] = Counter()
    rows: Counter[Any] = Counter()

    def counted(owner: Any, name: str, note: Any) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            note(*args)
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, outer)

    def factored(H: Tensor, *rest: Any) -> None:
        seen["factored"] += bool(H.any())

    def rounded(method: str, W: Tensor, grid: Any, *rest: Any) -> None:
        rows[method, grid] += W.shape[0]
        seen["pieces"] += 1

    view = model_view(model)
    survey = Machine(model, view, LENGTH, NOTHING).survey
    work = calibrated_work(plan_gguf(model, recipe), N, LENGTH, FAST, survey)

    counted(whit.models.stream.BlockStream, "run", lambda *_: seen.update(["run"]))
    counted(whit.pipeline.rounder, "curvature", factored)
    counted(whit.pipeline.rounder, "rounded", rounded)
    counted(whit.pipeline.folding, "column_factors", lambda *_: seen.update(["tried"]))
    counted(Curvature, "rescaled", lambda *_: seen.update(["rescaled"]))
    calibration = Calibration(torch.tensor(random_tokens(N * LENGTH)).view(N, LENGTH), 0.0, FAST.effort)
    write_gguf(model, recipe, tmp_path / "a.gguf", calibration=calibration)

    assert work.count(PASS) == seen["run"]
    tried = work.count(LONE_FACTOR)
    assert tried == seen["tried"]
    # what was worth it is factored again; all of it is taken for worth it
    assert work.count(FACTOR) - tried == seen["factored"]
    assert tried <= seen["rescaled"] <= 2 * tried
    kinds = [each for each in work.kinds() if isinstance(each, tuple) and each[0] == "feedback"]
    assert {each: work.rows(each) for each in kinds} == dict(rows)
    assert sum(work.count(each) for each in kinds) == seen["pieces"]


def test_work_grows_with_what_it_is_made_of(tmp_path: Path) -> None:
    model = open_model(saved("llama", tmp_path))
    plan, n_bytes = plan_model(model, recipe_named("q4_0", "feedback"))
    survey = Survey((), (2, 2))
    few, many = (calibrated_work(plan, n, LENGTH, FAST, survey) for n in (4, 8))
    assert many.count(PASS) - few.count(PASS) == 2 * 2 * 4  # blocks, before and after, windows
    assert many.count(FACTOR) == few.count(FACTOR)
    written = job_work(plan, n_bytes, Text(8, LENGTH, sampled=(3,)), FAST, survey, 2)
    assert written.count(STEP) == LENGTH - 1
    assert written.count(SLOW_PASS) == 2 * 2 * 2  # models, windows, blocks
    assert written.rows(WRITE) > n_bytes
    unseen = job_work(plan, n_bytes, Text(8, LENGTH), FAST, survey, 0)
    assert unseen.count(SLOW_PASS) == unseen.count(STEP) == 0
    assert sum(unseen.rows(each) for each in unseen.kinds() if isinstance(each, tuple) and each[0] == CHECK) == (
        plan.n_weights
    )


def test_plain_rounding_needs_no_text_and_gradients_are_not_forecast(tmp_path: Path) -> None:
    model, survey = open_model(saved("llama", tmp_path)), Survey((), (2, 2))
    plan, n_bytes = plan_model(model, recipe_named("q4_0", "nearest"))
    work = job_work(plan, n_bytes, Text(8, LENGTH), FAST, survey, 0)
    assert work.count(PASS) == work.count(FACTOR) == 0
    assert work.rows(READ) == plan.n_weights
    plan, n_bytes = plan_model(model, recipe_named("q4_0", "fisher"))
    with pytest.raises(RecipeError, match="gradients"):
        job_work(plan, n_bytes, Text(8, LENGTH), FAST, survey, 0)


def test_inputs_that_are_quantized_too_are_not_rescaled_by_feedback(tmp_path: Path) -> None:
    model = open_model(saved("llama", tmp_path))
    recipe = folder_recipe("w8a8", "feedback")
    assert recipe is not None
    plan, _ = plan_model(model, recipe)
    work = calibrated_work(plan, N, LENGTH, FAST, Survey((), (2, 2)))
    assert not [each for each in work.kinds() if isinstance(each, tuple) and each[0] == SAMPLE]
