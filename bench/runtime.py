"""KL divergence as llama.cpp's own perplexity tool measures it, which also rounds activations as its runtime does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from bench.measure import run
from bench.peers import WORK, llama_cpp
from whit.calibration.text import default_text

TRIES = 20


class Runtime:
    """The tool on the held-out text.

    text        the file that it reads
    perplexity  of the original, as the tool prints it
    """

    def __init__(self, source: Path, windows: int) -> None:
        """Writes the logits of `source` on so many windows to bench/work."""
        self.text, self._logits = WORK / f"{source.stem}.txt", WORK / f"{source.stem}.logits"
        self.text.write_text(default_text().content, encoding="utf-8")
        self._windows = str(windows)
        self._tool = llama_cpp("llama-perplexity")
        self.perplexity = _found(r"Final estimate: PPL = ([\d.]+)", self._run(source))

    def of(self, path: Path) -> dict[str, str]:
        """Perplexity, mean KL and the share of equal top tokens (percent) of a file, as the tool prints them."""
        for _ in range(TRIES):  # now and then the tool ends before the thread that prints has printed everything
            output = self._run(path, "--kl-divergence")
            if "Same top p" in output:
                break
        return {
            "perplexity": _found(r"Mean PPL\(Q\) *: *([\d.]+)", output),
            "kl": _found(r"Mean +KLD: *([\d.]+)", output),
            "same_top": _found(r"Same top p: *([\d.]+)", output),
        }

    def close(self) -> None:
        """Remove the logits, which take half a gigabyte."""
        self._logits.unlink(missing_ok=True)

    def _run(self, path: Path, *options: str) -> str:
        common: tuple[Any, ...] = ("-f", self.text, "-c", "512", "-b", "512", "--chunks", self._windows, "-t", "2")
        command = [self._tool, "-m", path, *common, "--kl-divergence-base", self._logits, *options]
        printed = WORK / f"{self._logits.stem}.printed"  # into a file, which does not let the printing thread wait
        run("sh", "-c", f"{shlex.join(map(str, command))} > {shlex.quote(str(printed))} 2>&1")
        return printed.read_text(errors="replace")


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{pattern!r} is not in the output:\n{text[-2000:]}")
    return found[1]
