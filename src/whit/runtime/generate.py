"""Text from a GGUF file through llama.cpp's runtime, piece by piece.

What people will run is llama.cpp, so that is what answers here, not an implementation of ours: a file that speaks
here speaks there. The runtime comes with the optional package xllamacpp and works in a process of its own (worker.py
says why); when the caller stops reading, is interrupted or dies, that process ends.

Left out: conversations of several turns, and serving other programs.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from whit.checkpoints.gguf import GGUFFile
from whit.errors import BrokenFileError, MissingPackageError, RecipeError

TEMPLATE_TOKENS = 1024  # room for what a chat template adds around a prompt
SHORTEST_CONTEXT = 2048  # for files that do not say how long a text they read


@dataclass(frozen=True)
class Timings:
    """How an answer came about, by the runtime's own clock; loading the file is not counted.

    prompt_tokens, prompt_tokens_per_second  reading the prompt
    tokens, tokens_per_second                writing the answer
    ended                                    the model ended the answer itself, rather than running out of tokens
    """

    prompt_tokens: int
    prompt_tokens_per_second: float
    tokens: int
    tokens_per_second: float
    ended: bool


class Generation(Iterator[str]):
    """The pieces of an answer as they come; afterwards, what it took. Closing it early ends the runtime."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._timings: Timings | None = None
        self._pieces = self._run(request)

    def __next__(self) -> str:
        """The next piece of text. Raises BrokenFileError or RecipeError with the runtime's reason."""
        return next(self._pieces)

    def close(self) -> None:
        """Stop now; safe to call at any time."""
        self._pieces.close()

    @property
    def timings(self) -> Timings:
        """Raises ValueError while the answer is not complete."""
        if self._timings is None:
            raise ValueError("the answer is not complete: read all its pieces first")
        return self._timings

    @property
    def tokens_per_second(self) -> float:
        """Speed of writing. Raises ValueError while the answer is not complete."""
        return self.timings.tokens_per_second

    def _run(self, request: dict[str, Any]) -> Generator[str]:
        command = [sys.executable, "-P", "-m", "whit.runtime.worker"]  # -P: nothing is imported from the working folder
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            # Its own session: Ctrl-C reaches this process alone, which then ends the other in order.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                with process.stdin:
                    process.stdin.write(json.dumps(request))
                yield from self._read(process.stdout, request)
                if process.wait() != 0 and self._timings is None:
                    raise BrokenFileError(_failure(request["path"], process.returncode, log))
            finally:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()

    def _read(self, stdout: IO[str], request: dict[str, Any]) -> Iterator[str]:
        ended = False
        for line in stdout:
            event = json.loads(line)
            if "error" in event:
                raise RecipeError(_refusal(request["path"], event["error"]))
            if "text" in event:
                yield event["text"]
            if "finish" in event:
                ended = event["finish"] == "stop"
            if "done" in event:
                self._timings = _timings(event["done"], ended)


def generate(
    path: Path,
    prompt: str,
    n_tokens: int = 128,
    raw: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
) -> Generation:
    """Let a GGUF file answer a prompt.

    n_tokens     at most so many tokens
    raw          continue the prompt as it stands; otherwise a chat template in the file is applied to it
    temperature  0 always takes the likeliest token; above, tokens are drawn with `seed`
    threads      processor cores to use; None for all. On a busy machine fewer are much faster: they wait for each other
    Returns an iterator over the pieces of the answer; its `timings` are there when it has ended. The runtime starts
    with the first piece. Raises MissingPackageError without xllamacpp, BrokenFileError for a file that cannot be
    loaded, RecipeError for a request that makes no sense or does not fit the model's context.

        for piece in generate(Path("small.gguf"), "Why is the sky blue?"):
            print(piece, end="")
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingPackageError("Running a file needs llama.cpp's runtime: pip install 'whit[run]'")
    if not prompt:
        raise RecipeError("The prompt is empty; give the model something to answer or continue.")
    if n_tokens < 1:
        raise RecipeError(f"{n_tokens} tokens cannot be written; ask for 1 or more.")
    if temperature < 0:
        raise RecipeError(f"A temperature of {temperature} makes no sense; 0 is greedy, 1 as the model was trained.")
    if threads is not None and threads < 1:
        raise RecipeError(f"{threads} threads cannot work; ask for 1 or more.")
    metadata = GGUFFile(path).metadata
    request = {
        "path": str(path),
        "prompt": prompt,
        "chat": not raw and "tokenizer.chat_template" in metadata,
        "n_ctx": _context(metadata, prompt, n_tokens),
        "n_tokens": n_tokens,
        "temperature": temperature,
        "seed": seed,
        "threads": threads,
    }
    return Generation(request)


def _context(metadata: Any, prompt: str, n_tokens: int) -> int:
    """Tokens of context to reserve: enough for prompt and answer, but no more than the model reads.

    Its memory is taken at once, so the model's full length (often 128k) would cost gigabytes for a short answer.
    """
    longest = metadata.get(f"{metadata.get('general.architecture')}.context_length", SHORTEST_CONTEXT)
    needed = len(prompt.encode()) + TEMPLATE_TOKENS + n_tokens  # a token is at least one byte
    return int(min(longest, needed))


def _timings(figures: dict[str, Any], ended: bool) -> Timings:
    return Timings(
        prompt_tokens=figures["prompt_n"],
        prompt_tokens_per_second=figures["prompt_per_second"],
        tokens=figures["predicted_n"],
        tokens_per_second=figures["predicted_per_second"],
        ended=ended,
    )


def _refusal(path: str, error: dict[str, Any]) -> str:
    if error.get("type") == "exceed_context_size_error":
        return (
            f"{path}: the prompt has {error['n_prompt_tokens']} tokens, the model reads at most {error['n_ctx']}. "
            "Shorten the prompt."
        )
    return f"{path}: llama.cpp refuses the request: {str(error.get('message', error)).rstrip('.')}."


def _failure(path: str, status: int, log: IO[str]) -> str:
    """What went wrong, in the words of the runtime's log."""
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    reasons = [line.split("error loading model:", 1)[1].strip() for line in lines if "error loading model:" in line]
    errors = [re.sub(r"^[\d.]+ E ", "", line) for line in lines if re.match(r"[\d.]+ E ", line)]
    found = (reasons or errors or lines[-1:] or [f"it ended with status {status} and said nothing"])[-1]
    return f"{path}: llama.cpp cannot run this file: {found.rstrip('.')}. `whit inspect` shows what is in it."
