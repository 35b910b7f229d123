"""`whit verify FILE --against MODEL`: one word for a file, and what is to blame."""

from __future__ import annotations

import json as jsonlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from whit.calibration.text import WINDOW, Text
from whit.cli.measured import DEFAULT_WINDOWS, measured_windows
from whit.cli.progress import progress_bar
from whit.cli.ranks import DEVICE_HELP
from whit.devices import device_named
from whit.errors import ModelError
from whit.models.open import open_model
from whit.pipeline.verify import Culprit, Verified, verify

N_FAULTS = 8  # printed


def command(
    file: Annotated[Path, typer.Argument(help="A .gguf file or a quantized folder.")],
    against: Annotated[str, typer.Option(help="The original: folder, .gguf file, hub id or built-in name.")],
    text: Annotated[
        Path | None, typer.Option(help="A text file in UTF-8; by default documentation that ships with Python.")
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, help=f"Use at most so many windows of {WINDOW} tokens, from the start.")
    ] = DEFAULT_WINDOWS,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say in one word whether a written file is good, and which tensors are to blame if it is not.

    The exit status is 1 for damaged and broken files.
    """
    if not file.exists():
        raise ModelError(f"{file}: no such file or folder. Give what `whit quantize` has written.")
    place, original = device_named(device), open_model(against)
    source, used = measured_windows(original, text, windows)
    with progress_bar("verifying") as progress:
        found = verify(file, original, used, progress, place)
    if json:
        print(jsonlib.dumps(_flat(file, against, source, len(used), used.shape[1], found), indent=1, allow_nan=False))
    else:
        _print(Console(highlight=False, markup=False), file, against, found)
    if not found.verdict.passed:
        raise typer.Exit(1)


def _flat(file: Path, against: str, text: Text, n_windows: int, length: int, found: Verified) -> dict[str, Any]:
    """For machines; what is infinite or undefined becomes null."""
    figures = {} if found.result is None else asdict(found.result)
    content = {
        "file": str(file),
        "reference": against,
        "verdict": found.verdict.word,
        "near": found.verdict.near or None,
        "why": found.verdict.why,
        "faults": list(found.faults),
        **figures,
        "continuations": None if found.continuations is None else asdict(found.continuations),
        "culprits": [{**asdict(each), "ratio": each.damage.ratio} for each in found.culprits],
        "findings": [asdict(each) for each in found.findings],
        "tensors": found.n_tensors,
        "tensors_with_one_decoder": found.alone,
        "text": text.name,
        "windows": n_windows,
        "window_tokens": length,
        "seconds": found.seconds,
    }
    return {key: _finite(value) for key, value in content.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(console: Console, file: Path, against: str, found: Verified) -> None:
    console.print(f"{file} against {against}", soft_wrap=True)
    for line in result_lines(found):
        console.print(f"  {line}", soft_wrap=True)
    for each in found.findings:
        console.print(f"  lint ({', '.join(each.runtimes)}): {each.what}. Do: {each.remedy}.", soft_wrap=True)
    if found.culprits:
        _print_culprits(console, found.culprits)
    for fault in found.faults[:N_FAULTS]:
        console.print(f"fault: {fault}", soft_wrap=True)
    if len(found.faults) > N_FAULTS:
        console.print(f"and {len(found.faults) - N_FAULTS} more faults (--json lists them)")
    near = f", or {found.verdict.near} (within two standard errors)" if found.verdict.near else ""
    console.print(f"{found.verdict.why}; {found.seconds:.0f} s", soft_wrap=True)
    console.print(f"Verdict: {found.verdict.word}{near}")


def result_lines(found: Verified) -> list[str]:
    """What was measured, a line each."""
    lines = []
    if found.n_tensors:
        alone = f", {found.alone} of them by one decoder only" if found.alone else " by two decoders"
        lines.append(f"{found.n_tensors} tensors read{alone} and compared with the original's")
    if (result := found.result) is not None:
        lines.append(
            f"KL divergence {result.kl_mean:.4g} ± {result.kl_mean_se:.1g} nats per token over {result.tokens} tokens; "
            f"same top token {100 * result.same_top:.1f} ± {100 * result.same_top_se:.1f} %; "
            f"perplexity ratio {result.perplexity_ratio:.4g} ± {result.perplexity_ratio_se:.1g}"
        )
    if (said := found.continuations) is not None:
        lines.append(
            f"greedy continuations: {said.identical} of {said.prompts} the same for {said.tokens} tokens; "
            f"{100 * said.same:.0f} % of the tokens come before the first difference"
        )
    return lines


def _print_culprits(console: Console, culprits: tuple[Culprit, ...]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor")
    table.add_column("type")
    for title in ("error, %", "plain rounding's", "times", "KL alone, nats"):
        table.add_column(title, justify="right")
    for each in culprits:
        damage = each.damage
        plain = damage.expected > 0
        table.add_row(
            each.name.removesuffix(".weight"),
            each.type,
            f"{100 * damage.error:.3g}",
            f"{100 * damage.expected:.3g}" if plain else "-",
            f"{damage.ratio:.2f}" if plain else "-",
            "-" if each.kl is None else f"{each.kl:.3g}",
        )
    console.print(table)
