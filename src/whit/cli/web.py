"""`whit web FILE -o DIR`: a page that runs the model in the visitor's browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whit.cli.progress import progress_bar
from whit.web.page import CONTEXT, megabytes, write_page


def command(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    title: Annotated[
        str, typer.Option(help="Title of the page, by default the model's name.", show_default=False)
    ] = "",
    about: Annotated[str, typer.Option(help="A sentence to stand under it.")] = "",
    context: Annotated[int, typer.Option(help="Tokens of conversation and answer together.")] = CONTEXT,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier page.")] = False,
) -> None:
    """Write a static page that runs a GGUF file in the visitor's own browser."""
    with progress_bar("writing") as progress:
        page = write_page(file, out, title, about, context, force, progress)
    model = page.parts[0].file if len(page.parts) == 1 else f"in {len(page.parts)} parts"
    print(f"{out}: {megabytes(page.n_bytes)}, the model {megabytes(sum(part.bytes for part in page.parts))} ({model})")
    if not page.chat:
        print("The file has no chat template: the page continues texts and holds no conversations.")
    print(f"Try it: python -m http.server -d {out}, then open http://localhost:8000. Any static host will do.")
