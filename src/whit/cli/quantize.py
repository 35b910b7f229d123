"""`whit quantize MODEL --recipe NAME -o OUT`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from whit.calibration.text import WINDOW
from whit.checkpoints.atomic import check_apart, check_folder, check_target, moved
from whit.checkpoints.imatrix import read_imatrix
from whit.checkpoints.stacked import StackedTensors
from whit.cli.budget import best_file, file_bytes, parse_size, read_damages, swept
from whit.cli.calibration import CALIB_HELP, HELD_OUT, calibration_for, longest, planned_text, shared_out
from whit.cli.keep import (
    KEEP_HELP,
    SALIENT_HELP,
    TYPES_HELP,
    check_rules,
    check_types,
    raising,
    types_of,
)
from whit.cli.progress import progress_bar
from whit.cli.ranks import DEVICE_HELP, RANKS_HELP, helped, is_helper, working
from whit.cli.result import print_result, write_report
from whit.devices import device_named
from whit.errors import CheckFailedError, OutputError, RecipeError
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.afterwards import Intended, look
from whit.pipeline.allocate import Allocator
from whit.pipeline.effort import DEFAULT_PRESET, PRESETS, Calibration
from whit.pipeline.folder import plan_model, write_model
from whit.pipeline.forecast import check_ram
from whit.pipeline.inputs import SHARES
from whit.pipeline.keep import check_kept, keeping
from whit.pipeline.plan import FLOAT_GRIDS, Plan
from whit.pipeline.quantize import Result
from whit.pipeline.salient import Salient, parse_share
from whit.pipeline.targets import GGUF, LAYOUTS
from whit.recipes.files import read_recipe, write_recipe
from whit.recipes.folders import EXAMPLES, folder_recipe
from whit.recipes.named import RECIPES, recipe_named
from whit.recipes.recipe import Recipe
from whit.rounding.methods import FISHER, METHODS
from whit.rounding.named import ROUNDINGS, check_rounding

CALIB_DEFAULTS = ", ".join(f"`{preset.text}` for {name}" for name, preset in PRESETS.items())
RAM_HELP = (
    "The process may take so much memory, such as 4GB: what it cannot hold of the text's hidden states goes to disk."
)
ROUNDING_HELP = (
    f"One of: {', '.join([*ROUNDINGS, *METHODS])}. `nearest`, `search` and `kl` need no calibration text; the others "
    "look at what arrives at every layer, those with `fisher` also at how much every weight matters to the predictions."
)


def command(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id or a built-in name (smollm2-135m).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The GGUF file to write; a folder for recipes of GPUs.")],
    recipe: Annotated[
        str | None, typer.Option(help=f"One of: {', '.join([*RECIPES, *EXAMPLES])}; or a file of --save-recipe.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="Instead of a recipe: the best file of at most this size, such as 95MB or 4GiB.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help=f"With --fit, --bpw or --max-kl: one of {', '.join(LAYOUTS)}.")
    ] = GGUF,
    types: Annotated[str | None, typer.Option(help=TYPES_HELP)] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="With --fit: room for this many tokens of context must be left.")
    ] = None,
    bpw: Annotated[
        float | None, typer.Option(min=0.5, max=32, help="As --fit, in bits per weight of the whole file.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="The smallest file that loses at most so many nats per token, measured.")
    ] = None,
    repair: Annotated[
        int, typer.Option(min=0, help="With --fit or --bpw: write and measure so many other choices, keep the best.")
    ] = 0,
    table: Annotated[
        Path | None,
        typer.Option(help="With --fit, --bpw, --max-kl or --salient: a file of `whit plan --save`, for no sweep."),
    ] = None,
    save_recipe: Annotated[Path | None, typer.Option(help="Write the recipe, tensor by tensor, to this JSON file.")] = (
        None
    ),
    preset: Annotated[str, typer.Option(help=f"How much work: {', '.join(PRESETS)}.")] = DEFAULT_PRESET,
    rounding: Annotated[str, typer.Option(help=ROUNDING_HELP)] = "feedback",
    calib: Annotated[
        str | None, typer.Option(help=f"{CALIB_HELP} When not given: {CALIB_DEFAULTS}.", show_default=False)
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of 512 tokens to calibrate on, instead of the preset's number.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="An importance matrix of llama.cpp or `whit imatrix`, instead of a text.")
    ] = None,
    distil: Annotated[
        int, typer.Option(min=0, help="Then let scales and norms follow the original for so many steps, such as 100.")
    ] = 0,
    minutes: Annotated[float | None, typer.Option(min=0, help="End --distil after about so many minutes.")] = None,
    keep: Annotated[list[str] | None, typer.Option("--keep", help=KEEP_HELP)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="The old name of --keep.", hidden=True)] = None,
    salient: Annotated[str | None, typer.Option(help=SALIENT_HELP)] = None,
    pure: Annotated[bool, typer.Option("--pure", help="One type for every tensor that it fits, the head too.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write what every tensor lost to this JSON file.")] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    ranks: Annotated[int, typer.Option(min=1, max=SHARES, help=RANKS_HELP)] = 1,
    rank: Annotated[int, typer.Option(hidden=True, envvar="RANK", help="What torchrun calls this process.")] = 0,
    ram: Annotated[str | None, typer.Option(help=RAM_HELP)] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not open the result again to check and measure it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Make a model smaller: write a GGUF file, or a folder for vLLM and transformers, by a recipe."""
    if is_helper(rank):
        helped(model, device)
        return
    console = Console(highlight=False, markup=False)
    check_rounding(rounding)
    place = device_named(device)
    if preset not in PRESETS:
        raise RecipeError(f"There is no preset called {preset!r}. Known presets: {', '.join(PRESETS)}.")
    _check_request(recipe, fit, bpw, max_kl, context, repair, pure, format_, distil, minutes)
    check_rules(recipe is not None, salient, types, table)
    wanted = [*(set_ or ()), *(keep or ())]  # one option under two names
    opened = open_model(model)
    chosen: Recipe | None = None
    plan: Plan | None = None
    if recipe is not None:
        chosen = _recipe(recipe, rounding, pure)
        chosen, held = keeping(opened, chosen, wanted, rounding)
        plan, n_bytes = plan_model(opened, chosen)
        check_kept(plan, held)
        better = Salient(opened, chosen, held, rounding, parse_share(salient)) if salient else None
        layout = chosen.layout
    else:
        layout = format_
        chosen_from = types_of(types, layout)
        allocator = Allocator(opened, rounding, chosen_from, layout, wanted)
        check_types(allocator, chosen_from)
        held, better = allocator.kept, None
        n_bytes = allocator.most if max_kl is not None else file_bytes(opened, allocator, fit, bpw, context)
        allocator.check(n_bytes)
    if imatrix and rounding in FISHER:
        raise RecipeError(f"--rounding {rounding} takes gradients on a text; an importance matrix has none.")
    most = parse_size(ram) if ram else None
    if most and imatrix:
        raise RecipeError("--ram is kept where a text is run, and by plain rounding; leave it or --imatrix.")
    if most and plan:
        text_planned = planned_text(opened, preset, calib, windows)
        check_ram(opened, plan, text_planned, not no_verify, most)  # before any work
    if layout != GGUF and imatrix:
        raise RecipeError("--imatrix is for GGUF files; folders for GPUs are rounded on text.")
    if distil and chosen is not None and chosen.activations:
        raise RecipeError(f"--distil does not follow activations that are quantized too, as {chosen.name} does.")
    check = check_target if layout == GGUF else check_folder
    check(out, min(n_bytes, opened.n_bytes), force)  # before any work
    check_apart(out, model)
    check_beside(out, force, save_recipe, report)
    if table is not None and recipe is None:
        read_damages(table, allocator)
    calibration, unseen = None, None
    if plan is None or better or any(step.needs_moments for step in plan.steps):
        calibration, unseen = _calibration(
            opened, preset, calib, windows, imatrix, bool(repair) or max_kl is not None, place
        )
        console.print(f"Calibrating on {calibration.source}.", soft_wrap=True)
    if distil:
        from whit.cli import distil as distilling  # it imports transformers, which takes seconds

        held_out, train = distilling.texts(console, opened, calib, place)
    if ranks > 1 and (calibration is None or imatrix):
        raise RecipeError("--ranks shares out what is done with a text; there is none here, and all cores are used.")
    intended = Intended()
    scratch = bool(distil) or unseen is not None  # a run that is killed leaves no empty folder otherwise
    beside = TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") if scratch else nullcontext("")
    with beside as folder, working(ranks, model, device) as group:
        calibration = replace(calibration, ranks=group, ram=most) if calibration else None
        written = Path(folder) / out.name if distil else out
        text = None if calibration is None or imatrix else calibration.windows
        if chosen is not None and better is not None:
            chosen, raised = raising(console, opened, better, text, table, place)
            held = {**held, **raised}
        if chosen is None:
            damages = swept(opened, allocator, text, table, place)
            if unseen is not None:
                result = best_file(console, allocator, damages, n_bytes, max_kl, repair, calibration, unseen, folder)
                moved(result.path, written, force)
                chosen = result.plan.recipe
            else:
                chosen = allocator.fit(damages, n_bytes).recipe
        if unseen is None:
            with progress_bar("quantizing") as progress:
                watch = None if no_verify or distil else intended
                result = write_model(opened, chosen, written, force, progress, calibration, watch)
        if recipe is None and max_kl is None:
            console.print(f"Of {n_bytes:,} bytes {result.n_bytes:,} are used.")
        print_result(console, replace(result, path=out), held)
        if distil:
            distilling.write(console, opened, open_model(written), out, held_out, train, distil, minutes, force, place)
        if save_recipe:
            write_recipe(result.plan.recipe, save_recipe)
    _finish(console, opened, model, replace(result, path=out), report, calibration)
    if not no_verify:
        _verdict(console, opened, out, intended, most, place)


def check_beside(out: Path, force: bool, *others: Path | None) -> None:
    """Raise OutputError, before any work, when a small file beside the result cannot be written."""
    taken = {out.resolve()}
    for path in others:
        if path is not None:
            if path.resolve() in taken:
                raise OutputError(f"{path}: is to hold something else already. Choose another name.")
            taken.add(path.resolve())
            check_target(path, 0, force)


def _finish(
    console: Console,
    opened: Model,
    name: str,
    result: Result,
    report: Path | None,
    calibration: Calibration | None = None,
) -> None:
    """The report, a warning for sources that were quantized already, and what to do next."""
    if report:
        write_report(report, result, calibration)
    requantized = sorted({kind for kind in _source_types(opened) if kind.lower() not in FLOAT_GRIDS})
    if requantized and not isinstance(opened.tensors, StackedTensors):  # experts in MXFP4 are the original
        console.print(
            f"The source was already quantized ({', '.join(requantized)}): its damage is in this file too. "
            "Quantize the original if you have it."
        )
    console.print(f"Next: whit eval {result.path} --against {name}", soft_wrap=True)


def _verdict(
    console: Console, opened: Model, out: Path, intended: Intended, ram: int | None, device: torch.device
) -> None:
    """The file opened again, in two lines. Raises CheckFailedError when it is not what was to be written."""
    with progress_bar("verifying") as progress:
        found = look(out, opened, min(WINDOW, longest(opened)), intended, progress, ram, device)
    if found.faults:
        raise CheckFailedError(f"{out}: {'; '.join(found.faults)}. The file is damaged; write it again.")
    if found.compared:
        console.print(f"Read again by another decoder: {found.compared} tensors are what was to be written.")
    if found.verdict is None or found.result is None:
        console.print(f"Verdict: none, not measured: {found.unmeasured}. whit verify says more.", soft_wrap=True)
        return
    result = found.result
    console.print(
        f"Verdict: {found.verdict.word} (KL divergence {result.kl_mean:.3g} ± {result.kl_mean_se:.1g} nats, "
        f"{result.tokens} tokens; same top token {100 * result.same_top:.0f} %)",
        soft_wrap=True,
    )


def _calibration(
    model: Model,
    preset: str,
    calib: str | None,
    windows: int | None,
    imatrix: Path | None,
    measure: bool,
    device: torch.device,
) -> tuple[Calibration, Tensor | None]:
    """What rounding will look at, and with `measure` some windows of the same kind that it will not see."""
    if imatrix:
        if measure:
            raise RecipeError("--repair and --max-kl measure files on text like that of calibration; leave --imatrix.")
        source = f"the importance matrix {imatrix}"
        return Calibration.on_importance(read_imatrix(imatrix), PRESETS[preset].effort, source), None
    n = windows or PRESETS[preset].windows
    found = calibration_for(model, preset, calib, n + (HELD_OUT if measure else 0), device)
    if not measure:
        return found, None
    unseen, seen = shared_out(found.windows)
    return replace(found, windows=seen), unseen


def _check_request(
    recipe: str | None,
    fit: str | None,
    bpw: float | None,
    max_kl: float | None,
    context: int | None,
    repair: int,
    pure: bool,
    layout: str,
    distil: int,
    minutes: float | None,
) -> None:
    """Raise RecipeError for options that do not go together."""
    wanted = {"--recipe": recipe, "--fit": fit, "--bpw": bpw, "--max-kl": max_kl}
    if sum(value is not None for value in wanted.values()) != 1:
        raise RecipeError(f"Say what is wanted by exactly one of {', '.join(wanted)}.")
    if context is not None and fit is None:
        raise RecipeError("--context says how much of --fit is not for the file; give both.")
    if minutes is not None and not distil:
        raise RecipeError("--minutes ends --distil; give both.")
    if repair and fit is None and bpw is None:
        raise RecipeError("--repair looks for better choices within --fit or --bpw; give one of them.")
    if layout not in LAYOUTS:
        raise RecipeError(f"--format {layout} is not one of {', '.join(LAYOUTS)}.")
    if recipe is not None and layout != GGUF:
        raise RecipeError("A recipe's name says its format; --format is for --fit, --bpw and --max-kl.")
    if recipe is None and pure:
        raise RecipeError("--pure changes a recipe; save one with --save-recipe and edit it instead.")


def _recipe(name: str, rounding: str, pure: bool) -> Recipe:
    if not name.endswith(".json"):
        return folder_recipe(name, rounding) or recipe_named(name, rounding, pure)
    if pure:
        raise RecipeError(f"--pure changes named recipes; edit {name} instead.")
    return read_recipe(Path(name))


def _source_types(model: Model) -> list[str]:
    if model.quantization:
        return [str(model.quantization.get("quant_method"))]
    source = model.gguf_tensors
    return [] if source is None else [source.info(name).dtype for name in source.names()]
