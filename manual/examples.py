"""Run the commands of console blocks and write what they print below them: `python -m manual.examples [PAGE ...]`,
with `--only WORDS` those blocks alone in which these words stand.

Output that is copied by hand is soon that of another version. A page therefore holds blocks such as

    ```console
    $ whit inspect small.gguf | sed -n 1,5p
    ```

and everything below a `$ ` line is this script's. Pages run in one folder, `start` first, so that others can use the
file that it writes. All of it takes about half an hour; without arguments the folder is emptied before. Commands fail
where their block says so, "```console fails", and nowhere else: a page is written when all of its commands have done
as they should.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from manual.commands import PROMPT, ROOT

WORK = ROOT / "build" / "examples"
FIRST = "start"  # the page that writes small.gguf
WIDTH = 100  # of the terminal that programs are told of
_BLOCK = re.compile(r"^```console( fails)?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def main(names: list[str], only: str = "") -> None:
    """Fill the pages called `names`, all that have console blocks when there are none.

    only  words of the blocks to fill; the others stay as they are
    """
    if not names:
        shutil.rmtree(WORK, ignore_errors=True)
        names = sorted((page.stem for page in (ROOT / "docs").glob("*.md")), key=lambda name: (name != FIRST, name))
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as programs:
        whit = Path(programs) / "whit"
        whit.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from whit.cli.app import main; main()" "$@"\n')
        whit.chmod(0o755)
        path = os.pathsep.join((programs, os.environ["PATH"]))
        source = os.pathsep.join((str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))
        environment = {**os.environ, "PATH": path, "PYTHONPATH": source, "COLUMNS": str(WIDTH), "TERM": "dumb"}
        for name in names:
            page = ROOT / "docs" / f"{name}.md"
            page.write_text(filled(page.read_text(), WORK, environment, only))


def filled(text: str, folder: Path, environment: dict[str, str], only: str = "") -> str:
    """A page's text with the commands of its console blocks run again in `folder`, and their output in its place.

    only  words that must stand in a block for this
    Raises SystemExit, with what was printed, when a command fails, or succeeds in a block that says "fails".
    """

    def anew(block: re.Match[str]) -> str:
        if only not in block[2]:
            return block[0]
        word = block[1] or ""
        commands = [line.removeprefix(PROMPT) for line in block[2].splitlines() if line.startswith(PROMPT)]
        shown = [f"{PROMPT}{each}\n{_output(each, bool(word), folder, environment)}" for each in commands]
        return f"```console{word}\n{''.join(shown)}```"

    return _BLOCK.sub(anew, text)


def _output(command: str, fails: bool, folder: Path, environment: dict[str, str]) -> str:
    begin = time.monotonic()
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"{time.monotonic() - begin:6.1f} s  status {done.returncode}  {command}", flush=True)
    if bool(done.returncode) != fails:
        raise SystemExit(f"{command}\n{done.stdout}")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("pages", nargs="*")
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    main(asked.pages, asked.only)
