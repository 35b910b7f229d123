"""What each ingredient of the rounding is worth: one after the other put in, then each taken out of the whole.

`python -m bench.ablation [MODEL] [--recipe ...]`. Calibration and report text do not overlap. Divergences are means
over the report text against the original model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.peers import WORK
from whit.calibration.text import default_text, documentation_text, windows
from whit.evaluation.compare import compare_states, final_states
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.effort import Calibration
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named
from whit.rounding import polish
from whit.rounding.methods import Effort

CALIBRATION, REPORT = 24, 12  # windows
SWEEPS = 3
WHOLE = Effort(sweeps=SWEEPS)


@dataclass(frozen=True)
class Variant:
    """A run.

    parts  functions of `polish` that do nothing in it
    """

    label: str
    rounding: str = "feedback"
    strength: float = 0.5
    effort: Effort = WHOLE
    without: tuple[str, ...] = ()


BARE = Effort(sweeps=0, late=False, rescale=False)
VARIANTS = (
    Variant("plain rounding", "nearest"),
    Variant("scales searched, plain squared error", "search"),
    Variant("scales searched, weighted by mean squared inputs", "weighted", 0.0, BARE),
    Variant("GPTQ as published: feedback, scales of the range", "gptq", 0.0, BARE),
    Variant("feedback, scales searched on its targets", strength=0.0, effort=BARE, without=("_refit",)),
    Variant("+ late scales", strength=0.0, effort=replace(BARE, late=True), without=("_refit",)),
    Variant("+ refit", strength=0.0, effort=replace(BARE, late=True)),
    Variant("+ coordinate descent", strength=0.0, effort=replace(WHOLE, rescale=False)),
    Variant("+ corrected target", effort=replace(WHOLE, rescale=False)),
    Variant("+ rescaled columns: the whole"),
    Variant("whole, fixed scales within superblocks", effort=replace(WHOLE, late=False)),
    Variant("whole, no refit", without=("_refit",)),
    Variant("whole, no coordinate descent", effort=replace(WHOLE, sweeps=0)),
    Variant("whole, no corrected target", strength=0.0),
    Variant("whole, fully corrected target", strength=1.0),
    Variant("whole, damping 0.001", effort=replace(WHOLE, damping=0.001)),
    Variant("whole, damping 0.05", effort=replace(WHOLE, damping=0.05)),
)


@contextmanager
def _idle(names: tuple[str, ...]) -> Iterator[None]:
    """Functions of `polish` that hand back the parameters that they were given."""

    def nothing(delta: Any, codes: Any, params: Any, *rest: Any) -> Any:
        return params

    if not names:
        yield
        return
    with patch.object(polish, names[0], nothing), _idle(names[1:]):
        yield


def main() -> None:
    """Print a row per variant as it is measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--recipe", default="q4_0")
    parser.add_argument("--windows", type=int, default=CALIBRATION, help="to read")
    parser.add_argument("--report", type=int, default=REPORT, help="windows to report on")
    parser.add_argument("--only", nargs="*", help="labels of variants, all when not given")
    arguments = parser.parse_args()
    model = open_model(arguments.model)
    tokenizer = load_tokenizer(model)
    calibration = windows(tokenizer.encode(documentation_text("calibration").content), limit=arguments.windows)
    ids = windows(tokenizer.encode(default_text().content), limit=arguments.report)
    reference, file = final_states(model, ids), WORK / f"ablation.{Path(arguments.model).name}.gguf"
    print(f"{Path(arguments.model).name}, {arguments.recipe}: {len(calibration)} windows read, {len(ids)} reported.\n")
    print("| variant | KL divergence | squared error of the layers / plain | seconds |\n|---|---|---|---|", flush=True)
    for variant in VARIANTS:
        if arguments.only and variant.label not in arguments.only:
            continue
        started = time.perf_counter()
        with _idle(variant.without):
            report = write_gguf(
                model,
                recipe_named(arguments.recipe, variant.rounding),
                file,
                overwrite=True,
                calibration=Calibration(calibration, variant.strength, variant.effort),
            )
        seconds = time.perf_counter() - started
        found = compare_states(final_states(open_model(str(file)), ids), reference, ids)
        after, before = sum(each.loss for each in report.losses), sum(each.plain for each in report.losses)
        share = f"{after / before:.3f}" if before else ""
        print(
            f"| {variant.label} | {found.kl_mean:.5f} ± {found.kl_mean_se:.5f} | {share} | {seconds:.0f} |", flush=True
        )
        file.unlink()


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
