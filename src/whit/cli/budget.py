"""What `--fit`, `--bpw` and `--context` mean in bytes of a file, and the sweep that tells where to spend them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from whit.checkpoints.atomic import whole_file
from whit.cli.calibration import calibration_windows
from whit.cli.progress import Report as Progress
from whit.cli.progress import progress_bar
from whit.devices import CPU
from whit.errors import RecipeError
from whit.grids.floats import Float
from whit.grids.named import grid_named
from whit.memory import kv_cache_bytes, working_bytes
from whit.models.model import Model
from whit.pipeline.allocate import Allocator, Damages
from whit.pipeline.effort import Calibration
from whit.pipeline.quantize import Result
from whit.shape import shape_from_config

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"(\d[\d_]*\.?\d*|\.\d+)\s*([a-z]*)", re.IGNORECASE)
MOST_BYTES = 2**60
SWEPT = 8  # windows of the sensitivity sweep


def parse_size(text: str) -> int:
    """Bytes that a person typed: 95MB (10^6), 4GiB (2^30), 95000000. Raises RecipeError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in UNITS:
        raise RecipeError(f"{text!r} is not a size. Write it like 95MB, 4GB, 3.5GiB or 95000000.")
    size = float(match[1].replace("_", "")) * UNITS[match[2].lower()]
    if size > MOST_BYTES:
        raise RecipeError(f"{text!r} is more than any disk holds. Write it like 95MB, 4GB, 3.5GiB or 95000000.")
    return int(size)


def file_bytes(model: Model, allocator: Allocator, fit: str | None, bpw: float | None, context: int | None) -> int:
    """The largest file that meets a request: `--fit`, less what running needs with `--context`, or `--bpw`.

    Raises RecipeError when nothing meets it.
    """
    if bpw is not None:
        return int(bpw * allocator.n_weights / 8)
    assert fit is not None
    n_bytes = parse_size(fit)
    if context is None:
        return n_bytes
    shape = shape_from_config(model.config)
    if shape.max_context is not None and context > shape.max_context:
        raise RecipeError(f"{model.label} reads at most {shape.max_context} tokens; --context {context} is more.")
    cache, working = kv_cache_bytes(shape, context), working_bytes(shape, context)
    left = int(n_bytes - cache - working)
    if left < allocator.least:
        raise RecipeError(
            f"{n_bytes:,} bytes with {context} tokens of context: the cache of keys and values takes {cache:,.0f}, "
            f"working memory {working:,.0f}, the smallest file of this model {allocator.least:,}; together "
            f"{cache + working + allocator.least:,.0f}. Give more room, a shorter context or a smaller model."
        )
    return left


def swept(
    model: Model, allocator: Allocator, windows: Tensor | None, table: Path | None, device: torch.device = CPU
) -> Damages:
    """What every matrix on every grid would cost.

    windows  the calibration text, of which some are read; None for documentation
    table    a file of `whit plan --save`, instead of the sweep
    device   where the model runs
    Raises RecipeError when the table is of another model.
    """
    return read_damages(table, allocator) if table else sweep(model, allocator.candidates, windows, device=device)


def sweep(
    model: Model,
    candidates: Mapping[str, Sequence[str]],
    windows: Tensor | None,
    plain: bool = False,
    device: torch.device = CPU,
) -> Damages:
    """Nats per token for every tensor and each of its grids; plain for plain rounding, the others as for `swept`."""
    from whit.pipeline.sensitivity import sensitivities  # it imports transformers, which takes seconds

    if windows is None:
        windows, _ = calibration_windows(model, SWEPT)
    some = torch.linspace(0, len(windows) - 1, min(SWEPT, len(windows))).round().long()
    with progress_bar("sensitivities") as progress:
        return sensitivities(model, candidates, windows[some], progress=progress, plain=plain, device=device)


def best_file(
    console: Console,
    allocator: Allocator,
    damages: Damages,
    n_bytes: int,
    max_kl: float | None,
    repair: int,
    calibration: Calibration | None,
    unseen: Tensor,
    folder: str,
) -> Result:
    """Write and measure until a promise is kept or repair is over; the best file is in `folder`."""
    from whit.pipeline.trials import Trials, promised, repaired  # it imports transformers, which takes seconds

    with progress_bar("trying") as progress:
        trials = Trials(allocator.model, calibration, unseen, Path(folder), progress)
        if max_kl is not None:
            best, said = promised(allocator, damages, max_kl, trials)
        else:
            best, said = repaired(allocator, damages, n_bytes, trials, repair)
    for line in said:
        console.print(f"  tried on {len(unseen)} windows of their own: {line}")
    return best.result


def frontier_sizes(allocator: Allocator, points: int) -> list[int]:
    """Sizes in equal ratios, from the smallest file to 8.5 bits per weight (or to the largest, or all alike)."""
    most = min(allocator.most, max(allocator.least, int(8.5 * allocator.n_weights / 8)))
    ratio = (most / allocator.least) ** (1 / max(1, points - 1))
    return [min(most, int(allocator.least * ratio**i) + 1) if i else allocator.least for i in range(points)]


def check_damages(
    model: Model, allocator: Allocator, windows: Tensor, n: int, progress: Progress, device: torch.device = CPU
) -> list[dict[str, Any]]:
    """Predictions for n pairs of a tensor and a grid, spread over the file, beside what is measured.

    Both for plain rounding, so that nothing but the prediction is checked.
    """
    from whit.pipeline.sensitivity import sensitivities  # they import transformers, which takes seconds
    from whit.pipeline.spotcheck import measured

    names = list(allocator.candidates)
    chosen = [names[round(i * (len(names) - 1) / max(1, n - 1))] for i in range(n)]
    usual = [[grid for grid in allocator.candidates[name] if grid != "f16"] or ["f16"] for name in chosen]
    pairs = [(name, grids[i % len(grids)]) for i, (name, grids) in enumerate(zip(chosen, usual, strict=True))]
    wanted: dict[str, list[str]] = {}
    for name, grid in pairs:
        wanted.setdefault(name, []).append(grid)
    predicted = sensitivities(model, wanted, windows, progress=progress, plain=True, device=device)
    truth = measured(model, pairs, windows, progress, device)
    return [
        {"tensor": name, "grid": grid, "predicted": predicted[name][grid], "measured": each}
        for (name, grid), each in zip(pairs, truth, strict=True)
    ]


def write_damages(damages: Damages, path: Path) -> None:
    """Keep the result of a sweep. Raises OutputError when it cannot be written."""
    raw = json.dumps({"nats_per_token": damages}, indent=1).encode()
    with whole_file(path, len(raw), overwrite=True) as file:
        file.write(raw)


def read_damages(path: Path, allocator: Allocator) -> Damages:
    """The result of a sweep that was kept. Raises RecipeError when it does not belong to the allocator's model."""
    found = read_table(path)
    for name, grid in allocator.kept.items():
        if isinstance(grid_named(grid), Float):
            found.setdefault(name, {}).setdefault(grid, 0.0)  # moves every prediction alike, and no choice
    check_table(path, found, {name: (grid,) for name, grid in allocator.kept.items()})
    if any(not set(grids) <= set(found.get(name, {})) for name, grids in allocator.candidates.items()):
        raise RecipeError(f"{path}: not what `whit plan --save` writes for this model. Run it again.")
    return found


def check_table(path: Path, table: Damages, candidates: Mapping[str, Sequence[str]]) -> None:
    """Raise RecipeError when a sweep has no figure for a tensor on one of its grids."""
    for name, grids in candidates.items():
        for grid in grids:
            if grid not in table.get(name, {}):
                raise RecipeError(
                    f"{path}: does not say what {name} loses on {grid}. Run `whit plan --save` with the same --keep, "
                    "or leave --table."
                )


def read_table(path: Path) -> dict[str, dict[str, float]]:
    """What a sweep has found. Raises RecipeError for a file that is not what `whit plan --save` writes."""
    try:
        found: Any = json.loads(path.read_text())["nats_per_token"]
        given = [each for grids in found.values() for each in grids.values()]
        numbers = all(type(each) in (int, float) and 0 <= each < math.inf for each in given)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        numbers = False
    if not numbers:
        raise RecipeError(f"{path}: not what `whit plan --save` writes for this model. Run it again.")
    return found
