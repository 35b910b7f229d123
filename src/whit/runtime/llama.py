"""llama.cpp's runtime with one GGUF file, in a process of its own (worker.py says why).

The runtime comes with the optional package xllamacpp. When its owner closes it, is interrupted or dies, that process
ends.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from whit.checkpoints.gguf import GGUFFile
from whit.errors import BrokenFileError, RecipeError, TooLongError
from whit.runtime.answer import SHORTEST_CONTEXT, Generation, Messages, Settings, Timings, check_threads
from whit.runtime.installed import check_llama


def longest_context(path: Path) -> int:
    """Tokens that the model in a GGUF file reads at most. Raises ModelError for files that are none."""
    metadata = GGUFFile(path).metadata
    return int(metadata.get(f"{metadata.get('general.architecture')}.context_length", SHORTEST_CONTEXT))


class LlamaRuntime:
    """A GGUF file that is loaded, or being loaded: see Runtime.

    n_ctx    tokens of context; their memory is taken at once
    threads  processor cores to use; None for all. On a busy machine fewer are much faster: they wait for each other
    listen   how llama.cpp's own server answers on a port of this machine (worker.load); None for not at all
    Raises MissingPackageError, RecipeError, and ModelError for a file that is none; what llama.cpp cannot load is a
    BrokenFileError of `wait` and `answer`.
    """

    def __init__(
        self, path: Path, n_ctx: int, threads: int | None = None, listen: dict[str, Any] | None = None
    ) -> None:
        check_llama()
        check_threads(threads)
        self.label, self.has_template = str(path), "tokenizer.chat_template" in GGUFFile(path).metadata
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed by close()
        # -P: nothing is imported from the working folder. Its own session: Ctrl-C reaches this process alone, which
        # then ends the other in order.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "whit.runtime.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._address: str | None = None
        self._send({"path": str(path), "n_ctx": n_ctx, "threads": threads, "listen": listen})

    def wait(self) -> str:
        """Until the file is loaded; the address at which llama.cpp's server listens. Raises BrokenFileError."""
        if self._address is None:
            self._address = str(next(self._events())["ready"])
        return self._address

    def exited(self) -> bool:
        """Whether llama.cpp's process has ended by itself."""
        return self._process.poll() is not None

    def failure(self) -> BrokenFileError:
        """Why it has, in the words of the runtime's log; the file is blamed as long as it was not loaded."""
        status = self._process.wait()
        found = _reason(status, self._log)
        if self._address is not None:
            return BrokenFileError(f"{self.label}: llama.cpp has failed while it ran: {found}. Start it again.")
        return BrokenFileError(
            f"{self.label}: llama.cpp cannot run this file: {found}. `whit inspect` shows what is in it."
        )

    def answer(self, prompt: str | Messages, settings: Settings) -> Generation:
        """Continue a text as it stands, or answer a conversation; work starts with the first piece.

        Raises RecipeError, while it is read, for requests that llama.cpp refuses.
        """
        asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": [dict(each) for each in prompt]}
        request = {**asked, **vars(settings)}
        return Generation(self._answer(request))

    def resident(self) -> int:
        """Bytes of memory of llama.cpp's process, the pages of the file that it has touched among them."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):  # of what was still to be written
                if stream is not None:
                    stream.close()

    def _answer(self, request: dict[str, Any]) -> Generator[str, None, Timings]:
        self.wait()
        self._send(request)
        ended, timings, complete = False, None, False
        error: RecipeError | None = None
        try:
            for event in self._events():
                if "error" in event:
                    error = _refusal(self.label, event["error"])
                if "text" in event:
                    yield event["text"]
                if "finish" in event:
                    ended = event["finish"] == "stop"
                if "done" in event:
                    timings = _timings(event["done"], ended)
                if "end" in event:
                    complete = True
                    break
        finally:
            if not complete and not self.exited():  # whoever reads has seen enough; the next answer begins afresh
                self._send({"cancel": True})
                for event in self._events():
                    if "end" in event:
                        break
        if error is not None:
            raise error
        if timings is None:
            raise RecipeError(f"{self.label}: llama.cpp gave no answer.")
        return timings

    def _send(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading says why
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()

    def _events(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            yield json.loads(line)
        raise self.failure()


def _timings(figures: dict[str, Any], ended: bool) -> Timings:
    return Timings(
        prompt_tokens=figures["prompt_n"],
        prompt_tokens_per_second=figures["prompt_per_second"],
        tokens=figures["predicted_n"],
        tokens_per_second=figures["predicted_per_second"],
        ended=ended,
    )


def _refusal(path: str, error: dict[str, Any]) -> RecipeError:
    if error.get("type") == "exceed_context_size_error":
        return TooLongError(
            f"{path}: the prompt has {error['n_prompt_tokens']} tokens, the model reads at most {error['n_ctx']}. "
            "Shorten the prompt."
        )
    return RecipeError(f"{path}: llama.cpp refuses the request: {str(error.get('message', error)).rstrip('.')}.")


def _reason(status: int, log: IO[str]) -> str:
    """What went wrong, in the words of the runtime's log."""
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    reasons = [line.split("error loading model:", 1)[1].strip() for line in lines if "error loading model:" in line]
    errors = [re.sub(r"^[\d.]+ E ", "", line) for line in lines if re.match(r"[\d.]+ E ", line)]
    found: str = (reasons or errors or lines[-1:] or [f"it ended with status {status} and said nothing"])[-1]
    return found.rstrip(".")
