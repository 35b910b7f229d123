"""Tokens per second of a GGUF file in llama.cpp's runtime, on this machine."""

from __future__ import annotations

import platform
import re
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import psutil

from whit.runtime.answer import Settings
from whit.runtime.llama import LlamaRuntime, longest_context

PROMPT = "Once upon a time, there was a"
TOKENS, TIMES = 64, 3  # written, and how often; the fastest counts: everything else on a machine only slows it down
CONTEXT = 512


def tokens_per_second(path: Path) -> float:
    """Speed of writing, greedily, by the runtime's own clock; on as many threads as the processor has cores.

    Raises MissingPackageError without the runtime, BrokenFileError for a file that it does not load.
    """
    n_ctx = min(CONTEXT, longest_context(path))
    settings = Settings(min(TOKENS, n_ctx // 2))
    speeds = []
    with closing(LlamaRuntime(path, n_ctx, threads())) as runtime:
        for _ in range(TIMES):
            answer = runtime.answer(PROMPT, settings)
            for _piece in answer:
                pass
            speeds.append(answer.tokens_per_second)
    return max(speeds)


def threads() -> int:
    """Cores of this machine."""
    return psutil.cpu_count(logical=False) or 1


def machine() -> str:
    """What `tokens_per_second` measures, for people."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    cores = "1 core" if threads() == 1 else f"{threads()} cores"
    return f"llama.cpp (xllamacpp {version('xllamacpp')}) on {cores} of {name}"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")  # Linux; elsewhere Python knows
    return path.read_text(errors="replace") if path.is_file() else ""
