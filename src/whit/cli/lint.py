"""`whit lint PATH`: would transformers, vLLM and llama.cpp load it, and if not, why?"""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from whit.pipeline.lint import LLAMA, RUNTIMES, VLLM, Finding, lint


def command(
    path: Annotated[Path, typer.Argument(help="A .gguf file or a folder.")],
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what would stop a runtime, and what to do about it; the exit status is 1 when something does."""
    found = lint(path)
    if json:
        print(jsonlib.dumps([asdict(each) for each in found], indent=1))
    else:
        _print(found)
    other = LLAMA if path.is_dir() else VLLM  # made for another kind of file
    if any(each.stops and set(each.runtimes) != {other} for each in found):
        raise typer.Exit(1)


def _print(found: list[Finding]) -> None:
    console = Console(highlight=False, markup=False)
    for runtime in RUNTIMES:
        mine = [each for each in found if runtime in each.runtimes]
        stops = any(each.stops for each in mine)
        verdict = "does not run it" if stops else "runs it"
        console.print(f"{runtime}: {verdict}{', with a warning' if mine and not stops else ''}")
        for each in sorted(mine, key=lambda each: not each.stops):
            console.print(f"  {'stops' if each.stops else 'note'}: {each.what}. Do: {each.remedy}.", soft_wrap=True)
