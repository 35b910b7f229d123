"""`whit plan MODEL`: sizes, memory and exceptions from headers alone; with `--predict` also what each size loses."""

from __future__ import annotations

import json as jsonlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from whit.cli.budget import SWEPT, parse_size
from whit.cli.calibration import CALIB_HELP, HELD_OUT, planned_text
from whit.cli.keep import KEEP_HELP, TYPES_HELP, check_types, types_of
from whit.cli.ranks import DEVICE_HELP
from whit.cli.result import exception_lines
from whit.cli.tune import RESAMPLED, WINDOWS
from whit.errors import CheckFailedError, RecipeError
from whit.memory import LLAMA_CPP, VLLM, RunMemory, run_bytes
from whit.models.model import Model
from whit.models.open import open_headers
from whit.pipeline.afterwards import affordable
from whit.pipeline.allocate import Allocator
from whit.pipeline.counts import Text
from whit.pipeline.duration import Times
from whit.pipeline.effort import DEFAULT_PRESET, PRESETS
from whit.pipeline.folder import plan_model
from whit.pipeline.forecast import needs_text, ram_bytes, state_bytes
from whit.pipeline.gpu import job_bytes, result_bytes
from whit.pipeline.plan import Plan
from whit.pipeline.targets import GGUF, LAYOUTS
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.rounding.methods import FLOORED
from whit.shape import shape_from_config

CANDIDATES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k", "gptq-4bit-g128", "w4a16", "w8a8", "fp8")
CONTEXT = 8192
RUNS = {LLAMA_CPP: "GGUF files in llama.cpp", VLLM: "folders in vLLM, which takes all it may for its cache"}


@dataclass(frozen=True)
class Candidate:
    """One recipe: its plan, exact bytes of the weight files, peak memory of the job, memory to run the result.

    gpu      bytes of the job on a GPU, with --device cuda
    state    most bytes that the unfinished job keeps beside the output
    runtime  that the result is for; run_gpu: its bytes on a GPU that holds all of it
    """

    name: str
    plan: Plan
    n_bytes: int
    ram: float
    gpu: float
    state: float
    runtime: str
    run: RunMemory
    run_gpu: float


def command(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id or a built-in name (smollm2-135m).")],
    recipe: Annotated[
        list[str] | None, typer.Option(help="A recipe of `whit quantize`; may be repeated [the usual ones].")
    ] = None,
    fit: Annotated[str | None, typer.Option(help="At most this size, such as 95MB or 4GiB.")] = None,
    rounding: Annotated[str, typer.Option(help="As for `whit quantize`.")] = "feedback",
    preset: Annotated[str, typer.Option(help=f"As for `whit quantize`: {', '.join(PRESETS)}.")] = DEFAULT_PRESET,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of 512 tokens, instead of the preset's; with --tune to train on.")
    ] = None,
    ram: Annotated[str | None, typer.Option(help="The job may take so much memory, such as 8GB.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The job may take so much memory of a GPU, such as 8GB.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Of `whit tune MODEL --qat RECIPE`: quantizing, then training.")
    ] = False,
    context: Annotated[int, typer.Option(min=1, max=2**40, help="Tokens of context to run the result with.")] = CONTEXT,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the file would lie: its disk must hold it.")] = Path(),
    predict: Annotated[
        bool, typer.Option("--predict", help="Sweep the model and predict the loss at every size.")
    ] = False,
    points: Annotated[
        int | None, typer.Option(min=2, max=100, help="How many sizes to show [10]; means --predict.")
    ] = None,
    calib: Annotated[
        str | None, typer.Option(help=f"{CALIB_HELP} When not given: as for `whit quantize`; docs with --predict.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Keep the sweep in this file, for --table of `whit quantize`; means --predict."),
    ] = None,
    table: Annotated[Path | None, typer.Option(help="A file of --save instead of a sweep; means --predict.")] = None,
    check: Annotated[
        int, typer.Option(min=0, help="Also measure so many predictions, one tensor on one grid each; means --predict.")
    ] = 0,
    keep: Annotated[list[str] | None, typer.Option("--keep", help=f"With --predict or --fit. {KEEP_HELP}")] = None,
    format_: Annotated[str, typer.Option("--format", help=f"With --predict or --fit: {', '.join(LAYOUTS)}.")] = GGUF,
    types: Annotated[str | None, typer.Option(help=f"With --predict or --fit. {TYPES_HELP}")] = None,
    device: Annotated[str, typer.Option(help=f"With --predict. {DEVICE_HELP}")] = "cpu",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="As for `whit quantize`: less time and memory.")] = (
        False
    ),
    no_time: Annotated[
        bool, typer.Option("--no-time", help="With --recipe: do not time this machine for some seconds.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Exact figures.")] = False,
) -> None:
    """Say what a job would write and need, from headers alone; status 1 when it cannot be done."""
    if preset not in PRESETS:
        raise RecipeError(f"There is no preset called {preset!r}. Known presets: {', '.join(PRESETS)}.")
    if format_ not in LAYOUTS:
        raise RecipeError(f"--format {format_} is not one of {', '.join(LAYOUTS)}.")
    if predict or points or save or table or check:
        if recipe or fit or ram or gpu or tune:
            raise RecipeError("--recipe, --fit, --ram, --gpu and --tune are answered without a sweep; leave --predict.")
        from whit.cli.predict import predict as swept

        swept(
            model,
            points or 10,
            calib or PRESETS["fast"].text,
            windows or SWEPT,
            save,
            table,
            check,
            keep,
            format_,
            types,
            device,
            json,
        )
        return
    if (keep or types or format_ != GGUF) and fit is None:
        raise RecipeError("--keep, --types and --format are for --fit and --predict; add one of them.")
    if tune and not recipe:
        raise RecipeError("--tune is of files by a recipe: name one with --recipe, such as gptq-3bit-g64.")
    most = parse_size(ram) if ram else None
    limits = {"--fit": parse_size(fit) if fit else None, "--ram": most, "--gpu": parse_size(gpu) if gpu else None}
    opened = open_headers(model)
    text = planned_text(opened, preset, calib, None if tune else windows)
    looked = None if no_verify or tune else affordable(opened, text.length, most)[0]
    ask = _Asked(FLOORED if tune else rounding, text, looked, most, context, (windows or WINDOWS) if tune else 0)
    refused: dict[str, str] = {}
    found: list[Candidate] = []
    for name in recipe or (() if fit else CANDIDATES):
        try:
            found.append(_candidate(opened, name, ask))
        except RecipeError as error:
            if recipe:
                raise
            refused[name] = str(error)
    free = shutil.disk_usage(next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())).free
    problems = _problems(found, {**limits, "disk": free}) if recipe else []
    times = [] if no_time or not recipe else _times(opened, found, preset, ask, out)
    sizes = None
    if fit and not recipe:
        chosen = types_of(types, format_)
        allocator = Allocator(opened, rounding, chosen, format_, keep or ())
        check_types(allocator, chosen)
        sizes = {"least": allocator.least, "most": allocator.most}
        problems += _budget_problems(sizes, limits["--fit"] or 0, free)
    if json:
        print(jsonlib.dumps(_flat(opened, found, refused, sizes, free, problems, times), indent=2))
    else:
        _print(
            Console(highlight=False, markup=False), opened, found, refused, sizes, context, free, bool(recipe), times
        )
    if problems:
        raise CheckFailedError(" ".join(problems))


@dataclass(frozen=True)
class _Asked:
    """What every recipe is asked about.

    looked  windows that the verdict reads, None for no verdict
    most    bytes of --ram
    tuned   windows to train on, 0 for no training
    """

    rounding: str
    text: Text
    looked: int | None
    most: int | None
    context: int
    tuned: int


def _candidate(model: Model, name: str, ask: _Asked) -> Candidate:
    recipe = folder_recipe(name, ask.rounding) or recipe_named(name, ask.rounding)
    plan, n_bytes = plan_model(model, recipe)
    ram = ram_bytes(model, plan, ask.text, ask.looked, ask.most)
    gpu = job_bytes(model, plan, ask.text.length)
    if ask.tuned:
        from whit.tune import forecast  # it imports transformers, which takes seconds
        from whit.tune.train import Tuning

        n = ask.tuned * (1 + RESAMPLED) + HELD_OUT
        job = model, plan, Tuning(), n, ask.text.length
        ram, gpu = max(ram, forecast.ram_bytes(*job)), max(gpu, forecast.device_bytes(*job))
    runtime = LLAMA_CPP if recipe.layout == GGUF else VLLM
    run = run_bytes(n_bytes, shape_from_config(model.config), ask.context, runtime=runtime)
    state = state_bytes(plan, ask.text.windows)
    return Candidate(name, plan, n_bytes, ram, gpu, state, runtime, run, result_bytes(plan, run))


def _times(model: Model, found: list[Candidate], preset: str, ask: _Asked, out: Path) -> list[Times]:
    from whit.cli.duration import times, tune_times  # they import transformers, which takes seconds

    quantizing = times(model, [(each.plan, each.n_bytes) for each in found], preset, ask.text, ask.looked, out)
    if not ask.tuned:
        return quantizing
    return tune_times(model, [each.plan for each in found], quantizing, ask.text.length, ask.tuned, HELD_OUT)


def _problems(found: list[Candidate], limits: Mapping[str, int | None]) -> list[str]:
    said = []
    for each in found:
        needs = {"--fit": each.n_bytes, "--ram": each.ram, "--gpu": each.gpu, "disk": each.n_bytes + each.state}
        for what, needed in needs.items():
            has = limits[what]
            if has is not None and needed > has:
                said.append(f"{each.name} needs {needed / 1e6:,.1f} MB, but {what} allows {has / 1e6:,.1f} MB.")
    return said


def _budget_problems(sizes: dict[str, int], limit: int, free: int) -> list[str]:
    said = []
    for what, has in (("--fit", limit), ("disk", free)):
        if sizes["least"] > has:
            said.append(f"The smallest output has {sizes['least']:,} bytes, but {what} allows {has:,}.")
    return said


def _flat(
    model: Model,
    found: list[Candidate],
    refused: dict[str, str],
    sizes: dict[str, int] | None,
    free: int,
    problems: list[str],
    times: Sequence[Times],
) -> dict[str, Any]:
    return {
        "model": model.label,
        "source_bytes": model.n_bytes,
        "disk_free": free,
        "recipes": [
            {
                "recipe": each.name,
                "bytes": each.n_bytes,
                "ram_bytes": each.ram,
                "gpu_bytes": each.gpu,
                "disk_bytes": each.n_bytes + each.state,
                "state_bytes": each.state,
                "runtime": each.runtime,
                "run_bytes": each.run.total,
                "run_gpu_bytes": each.run_gpu,
                "kv_cache_bytes": each.run.kv_cache,
                "calibrated": needs_text(each.plan),
                "exceptions": [
                    {"tensor": step.tensor.name, "type": step.type, "reason": step.exception}
                    for step in each.plan.exceptions
                ],
                **(time.flat() if time else {}),
            }
            for each, time in zip_longest(found, times)
        ],
        "refused": refused,
        "fit": sizes,
        "problems": problems,
    }


def _print(
    console: Console,
    model: Model,
    found: list[Candidate],
    refused: dict[str, str],
    sizes: dict[str, int] | None,
    context: int,
    free: int,
    detailed: bool,
    times: Sequence[Times],
) -> None:
    console.print(
        f"{model.label}: {model.n_bytes / 1e6:,.1f} MB as stored, {free / 1e6:,.0f} MB of disk free", soft_wrap=True
    )
    if sizes:
        console.print(f"Outputs from {sizes['least']:,} to {sizes['most']:,} bytes are possible.")
    if found:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("recipe", "bytes", "job: RAM, MB", "GPU", "disk", "to run", "GPU", "KV cache"):
            table.add_column(title, justify="left" if title == "recipe" else "right")
        for each in found:
            sizes_ = (
                *(each.ram, each.gpu, each.n_bytes + each.state),
                *(each.run.total, each.run_gpu, each.run.kv_cache),
            )
            table.add_row(each.name, f"{each.n_bytes:,}", *(f"{size / 1e6:,.0f}" for size in sizes_))
        console.print(table)
        runtimes = {each.runtime: RUNS[each.runtime] for each in found}
        console.print(
            f"To run: {context} tokens of context, 16-bit cache; {', '.join(runtimes.values())}.\n"
            "GPU: the job with --device cuda, and all of the result; what CUDA takes for itself is not in it.\n"
            "Memory is estimated, bytes are exact.",
            soft_wrap=True,
        )
    for each, time in zip_longest(found, times) if detailed else ():
        console.print(f"{each.name}:")
        for line in (*(time.lines() if time else ()), *exception_lines(each.plan)):
            console.print(line, soft_wrap=True)
    if found and not detailed:
        console.print(
            "How long it takes, what stays in float or falls back, and why: name one with --recipe.", soft_wrap=True
        )
    for name, why in refused.items():
        console.print(f"{name}: not possible. {why}", soft_wrap=True)
