"""What every runtime has in common: a request, the pieces of an answer, and what it took."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from whit.errors import RecipeError

SHORTEST_CONTEXT = 2048  # for models that do not say how long a text they read
THREADS_PER_CORE = 4  # at most: beyond, they cost time and at last more memory than there is
Messages = Sequence[Mapping[str, str]]  # {"role": "user", "content": "..."}, in order


@dataclass(frozen=True)
class Settings:
    """How an answer is written.

    n_tokens     at most so many tokens
    temperature  0 always takes the likeliest token; above, tokens are drawn with `seed`
    top_p        drawn from the likeliest tokens that together have this probability, in (0, 1]
    seed         a whole number of 64 bits, sign included
    stop         texts that end the answer and are not part of it
    Raises RecipeError for values that make no sense.
    """

    n_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.n_tokens < 1:
            raise RecipeError(f"{self.n_tokens} tokens cannot be written; ask for 1 or more.")
        if not 0 <= self.temperature < float("inf"):
            raise RecipeError(
                f"A temperature of {self.temperature} makes no sense; 0 is greedy, 1 as the model was trained."
            )
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"A top_p of {self.top_p} makes no sense; it lies above 0 and is at most 1.")
        if not all(self.stop):
            raise RecipeError("A stop text is empty; give the text that ends the answer.")
        if not -(2**63) <= self.seed < 2**63:
            raise RecipeError(f"A seed of {str(self.seed)[:40]} makes no sense; it lies between -2^63 and 2^63 - 1.")


def check_threads(threads: int | None) -> None:
    """Raises RecipeError for a number of threads that cannot work, or that the system may refuse while it runs."""
    if threads is None:
        return
    if threads < 1:
        raise RecipeError(f"{threads} threads cannot work; ask for 1 or more.")
    cores = os.cpu_count() or 1
    if threads > THREADS_PER_CORE * cores:
        raise RecipeError(
            f"{threads} threads are too many for {cores} processor cores, they would wait for each other; "
            f"ask for {cores} or fewer."
        )


def check_text(text: str, what: str) -> None:
    """Raises RecipeError for bytes that are not UTF-8, which Python hands on as half surrogates.

    what  names the text, as the subject of a sentence
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(f"{what} is not UTF-8 from character {error.start + 1} on; write it in UTF-8.") from None


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
    """The pieces of an answer as they come; afterwards, what it took. Closing it early ends the work on it."""

    def __init__(self, pieces: Generator[str, None, Timings]) -> None:
        self._timings: Timings | None = None
        self._pieces = pieces

    def __next__(self) -> str:
        """The next piece of text. Raises BrokenFileError or RecipeError with the runtime's reason."""
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._timings = end.value or self._timings
            raise StopIteration from None

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


class Runtime(Protocol):
    """A loaded model that answers, one request at a time.

    label         what the user typed
    has_template  whether the model says how a conversation is written down
    """

    label: str
    has_template: bool

    def answer(self, prompt: str | Messages, settings: Settings) -> Generation:
        """Continue a text as it stands, or answer a conversation. Raises TooLongError, while it is read, for prompts
        longer than the context."""
        ...

    def resident(self) -> int:
        """Bytes of memory that it takes now."""
        ...

    def close(self) -> None:
        """Give everything back; safe to call twice."""
        ...
