"""Uniform, k-means and KL quantizers compared: `python -m bench.quantizers [MODEL] [--bits 3 4] [--share=-g64]`.

The same calibration and report text for all, which do not overlap; one table per number of bits, one line per method
(`--only METHOD` for one at a time: it depends on no other, and gathers Fisher information anew where it needs that),
with the bytes of the quantized matrices (embeddings, head and norms stay as they are) and its seconds. `--layers 3 12`
prints instead, in a minute, the losses of the layers of some blocks, and `--speed` how many rows a minute exact k-means
takes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor

from bench.peers import WORK
from whit.calibration.text import default_text, documentation_text, windows
from whit.evaluation.compare import compare_states, final_states
from whit.grids.floats import Float
from whit.grids.grid import Adaptive
from whit.grids.kmeans import kmeans, lloyd
from whit.grids.named import grid_named
from whit.models.links import Links
from whit.models.model import Model
from whit.models.open import open_model
from whit.models.stream import BlockStream
from whit.models.taps import watched
from whit.models.tokenizer import load_tokenizer
from whit.pipeline import calibrated, fisher
from whit.pipeline.effort import PRESETS, Calibration
from whit.pipeline.folder import FolderJob
from whit.pipeline.inputs import Inputs, moments_of
from whit.pipeline.quantize import model_view
from whit.recipes.folders import folder_recipe
from whit.rounding.curvature import curvature
from whit.rounding.methods import Effort, rounded

METHODS = {
    "uniform, feedback": ("int{}-asym", "feedback"),
    "kmeans by Fisher (SqueezeLLM, dense)": ("kmeans{}", "fisher"),
    "kmeans, Fisher, feedback, refit": ("kmeans{}", "fisher-feedback"),
    "kmeans, feedback, refit": ("kmeans{}", "feedback"),
    "kmeans and 0.5 % outliers by Fisher (SqueezeLLM, dense and sparse)": ("kmeans{}+0.5%", "fisher"),
    "kmeans and 0.5 % outliers, Fisher, feedback, refit": ("kmeans{}+0.5%", "fisher-feedback"),
    "uniform, nearest": ("int{}-asym", "nearest"),
    "kmeans, weights 1": ("kmeans{}", "nearest"),
    "kmeans, second moments": ("kmeans{}", "weighted"),
    "kl of the weights": ("int{}-asym", "kl"),
    "kl of the outputs (Fisher)": ("int{}-asym", "fisher"),
}


def main() -> None:
    """One table per number of bits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--bits", type=int, nargs="*", default=(4, 3))
    parser.add_argument("--share", default="", help="-g64, -tensor or nothing for a row")
    parser.add_argument("--read", type=int, default=16, help="calibration windows")
    parser.add_argument("--reported", type=int, default=16, help="windows of held-out text")
    parser.add_argument("--preset", default="fast", help="how much work feedback does")
    parser.add_argument(
        "--only", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD", help="methods by name"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="*", help="blocks whose layers' losses are compared, and no KL")
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.speed:
        speed()
        return
    model = open_model(arguments.model)
    tokenizer = load_tokenizer(model)
    read = windows(tokenizer.encode(documentation_text("calibration").content), limit=arguments.read)
    if arguments.layers:
        for bits in arguments.bits:
            layers(model, read, arguments.layers, bits)
        return
    ids = windows(tokenizer.encode(default_text().content), limit=arguments.reported)
    WORK.mkdir(parents=True, exist_ok=True)
    reference = final_states(model, ids)
    name = Path(arguments.model).name
    print(f"{name}: {len(read)} windows read, {len(ids)} reported, {arguments.threads} threads.", flush=True)
    calibration = Calibration(read, 0.0, PRESETS[arguments.preset].effort)
    with patch.object(calibrated, "fisher", _once(fisher.fisher)):
        for bits in arguments.bits:
            print(f"\n| {bits} bits{arguments.share} | KL | perplexity | MB | s |\n|---|---|---|---|---|", flush=True)
            for label in arguments.only:
                grid, rounding = METHODS[label]
                if "+" in grid and arguments.share == "-tensor":
                    continue  # outliers belong to rows
                recipe = folder_recipe(f"whit-{_shared(grid.format(bits), arguments.share)}", rounding)
                assert recipe is not None
                out = WORK / "quantizers"
                result = FolderJob(model, recipe).write(out, overwrite=True, calibration=calibration)
                found = compare_states(final_states(open_model(out), ids), reference, ids)
                size = sum(step.n_bytes for step in result.plan.steps if not isinstance(step.grid, Float)) / 1e6
                kl = f"{found.kl_mean:.4f} ± {found.kl_mean_se:.4f}"
                print(f"| {label} | {kl} | {found.perplexity:.2f} | {size:.2f} | {result.seconds:.0f} |", flush=True)


LAYERS = {
    "uniform, feedback": ("int{}-asym", "feedback", 1),
    "uniform in groups of 32, feedback": ("int{}-g32", "feedback", 1),
    "kmeans, second moments": ("kmeans{}", "weighted", 0),
    "kmeans, feedback, refit, 1 sweep": ("kmeans{}", "feedback", 1),
    "kmeans, feedback, refit, 8 sweeps": ("kmeans{}", "feedback", 8),
}


def layers(model: Model, read: Tensor, blocks: Sequence[int], bits: int) -> None:
    """E = sum of (Q - W) H (Q - W)^T of every matrix of some blocks, as a share of that of the first method; no prefix
    is quantized. The geometric mean over matrices, and bits per weight of the matrices together."""
    view = model_view(model)
    links, tensors = Links(view), {tensor.name: tensor for tensor in view.tensors}
    stream, shares, stored, n = BlockStream(model, links.read), dict[str, list[float]](), dict[str, float](), 0
    hidden = stream.start(read)
    for index in range(max(blocks) + 1):
        block, inputs = stream.fill(index), Inputs(stream.prefix(index))
        for k, window in enumerate(hidden):
            with watched(block, inputs.see):
                hidden[k] = stream.run(index, window)
            inputs.forget()
        for name in links.gguf_names(stream.prefix(index)) if index in blocks else []:
            if tensors[name].keep_float or len(tensors[name].shape) != 2:
                continue
            moments = moments_of(tensors[name].shape, inputs, links.slots(name))[0]
            assert moments is not None
            c, W, first = curvature(moments.H), tensors[name].read(), 0.0
            n += W.numel()
            for label, (grid_name, rounding, sweeps) in LAYERS.items():
                grid = grid_named(grid_name.format(bits))
                found, _ = rounded(rounding, W, cast(Adaptive, grid), c, Effort(sweeps=sweeps))
                lost = found.loss.sum().item()
                first = first or lost
                shares.setdefault(label, []).append(math.log(lost / first))
                stored[label] = stored.get(label, 0.0) + grid.bits_per_weight(W.shape[1]) * W.numel()
        stream.empty(index)
    print(f"\n| {bits} bits, blocks {blocks} | E | bits per weight |\n|---|---|---|")
    for label, each in shares.items():
        print(f"| {label} | {math.exp(sum(each) / len(each)):.3f} | {stored[label] / n:.2f} |", flush=True)


def speed() -> None:
    """Rows a minute of 2,048 normal weights: exact at 2, 3, 4 and 8 bits, and Lloyd from one start."""
    x = torch.randn(1000, 2048, generator=torch.Generator().manual_seed(0))
    v = torch.rand(1000, 2048, generator=torch.Generator().manual_seed(1))
    print(f"| levels | exact, rows/min on {torch.get_num_threads()} threads | Lloyd, 20 steps |\n|---|---|---|")
    for bits in (2, 3, 4, 8):
        n = 1000 if bits < 8 else 100
        begun = time.perf_counter()
        levels = kmeans(x[:n], v[:n], 2**bits)
        exact = time.perf_counter() - begun
        begun = time.perf_counter()
        lloyd(x[:n], v[:n], levels)
        print(f"| {2**bits} | {60 * n / exact:,.0f} | {60 * n / (time.perf_counter() - begun):,.0f} |", flush=True)


def _shared(grid: str, share: str) -> str:
    """The grid with another share of weights per table or scale; `-asym` or outliers come last."""
    levels, plus, outliers = grid.partition("+")
    return f"{levels.removesuffix('-asym')}{share}{'-asym' if levels.endswith('-asym') else ''}{plus}{outliers}"


def _once(gathered: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """The same information for all methods; the first that asks pays for it."""
    kept: dict[str, Tensor] = {}

    def found(model: Model, *arguments: object, **options: object) -> dict[str, Tensor]:
        if not kept:
            kept.update(gathered(model, *arguments, **options))
        return dict(kept)

    return found


if __name__ == "__main__":
    main()
