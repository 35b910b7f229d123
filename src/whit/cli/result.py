"""What `whit quantize` says of its result: the file, its types, what was gained and lost, in lines and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from whit.checkpoints.atomic import whole_file
from whit.cli.keep import kept_lines
from whit.pipeline.coverage import coverage, numbered
from whit.pipeline.effort import Calibration, TensorLoss
from whit.pipeline.keep import family
from whit.pipeline.plan import Plan
from whit.pipeline.quantize import Result

N_WORST, N_THIN = 3, 6  # tensors and experts named after a run


def print_result(console: Console, result: Result, held: Mapping[str, str] | None = None) -> None:
    """The file, its size, what every type holds, what was kept, and every exception with its reason."""
    plan = result.plan
    console.print(
        f"{result.path}: {result.n_bytes / 1e6:.2f} MB, {result.bits_per_weight:.2f} bits per weight, "
        f"recipe {plan.recipe.name}, {result.seconds:.2f} s",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (("type", "left"), ("tensors", "right"), ("weights", "right"), ("MB", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for kind in dict.fromkeys(step.type for step in plan.steps):
        steps = [step for step in plan.steps if step.type == kind]
        n_weights = sum(step.tensor.n_weights for step in steps)
        n_bytes = sum(step.n_bytes for step in steps)
        table.add_row(kind, str(len(steps)), f"{n_weights:,}", f"{n_bytes / 1e6:.2f}")
    console.print(table)
    for line in (*kept_lines(plan, held or {}), *exception_lines(plan), *loss_lines(result.losses)):
        console.print(line, soft_wrap=True)


def exception_lines(plan: Plan) -> list[str]:
    """One line per reason and kind of tensor, such as `F32: 30 x blk.*.attn_norm.weight (a norm)`."""
    groups = Counter((step.type, family(step.tensor.name), step.exception) for step in plan.exceptions)
    return [f"  not by the recipe, {kind}: {n} x {family} ({reason})" for (kind, family, reason), n in groups.items()]


def loss_lines(losses: tuple[TensorLoss, ...]) -> list[str]:
    """What the calibrated rounding gained, its least successes, and every note."""
    measured = [each for each in losses if each.n_tokens and each.plain > 0]
    if not measured:
        return []
    total = sum(each.loss for each in measured) / sum(each.plain for each in measured)
    worst = sorted(measured, key=lambda each: -each.loss / each.plain)[:N_WORST]
    named = ", ".join(f"{each.name} {each.loss / each.plain:.2f}" for each in worst)
    lines = coverage_lines(losses)
    lines += [f"Squared output error of the layers: {total:.3f} of plain rounding's (least gained: {named})."]
    notes = Counter((family(each.name), each.note) for each in losses if each.note)
    lines += [f"  note: {n} x {family}: {note}" for (family, note), n in notes.items()]
    dead = Counter(family(each.name) for each in losses if each.n_dead)
    lines += [f"  note: {n} x {family} had inputs that the text never woke" for family, n in dead.items()]
    return lines


def coverage_lines(losses: tuple[TensorLoss, ...]) -> list[str]:
    """What experts saw of the text, and a warning that names those that saw little."""
    experts = coverage(losses)
    thin = sorted((each for each in experts if each.thin), key=lambda each: each.n_tokens)
    if not thin:
        return []
    named = ", ".join(f"blk.{each.block} expert {each.expert} ({each.n_tokens})" for each in thin[:N_THIN])
    more = f" and {len(thin) - N_THIN} more" if len(thin) > N_THIN else ""
    return [
        f"Warning: {len(thin)} of {len(experts)} experts saw too few calibration tokens for statistics of their own; "
        f"they lean on their layer's mean: {named}{more}. More or other text helps (--windows, --calib)."
    ]


def write_report(path: Path, result: Result, calibration: Calibration | None) -> None:
    """As JSON: what was written, and the losses of every tensor."""
    content = {
        "file": str(result.path),
        "bytes": result.n_bytes,
        "recipe": str(result.plan.recipe),
        "calibration": calibration.source if calibration else None,
        "seconds": result.seconds,
        "tensors": [{**asdict(each), "expert": expert} for each, expert in numbered(result.losses)],
    }
    raw = json.dumps(content, indent=1).encode()
    with whole_file(path, len(raw), overwrite=True) as file:
        file.write(raw)
