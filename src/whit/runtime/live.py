"""Text from a live model: folders of every format that Whit reads, answered by their own codes in this process.

transformers' `generate` would do, with its streamer in a second thread. The loop here is shorter: a prompt goes
in by pieces (attention of a long one would fill the memory), each step is one call of the model with its own cache,
and whoever reads may stop between any two of them. It ends where llama.cpp would end.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from whit.checkpoints.folder import open_folder, read_config, read_json
from whit.errors import RecipeError, TooLongError
from whit.live.save import load
from whit.models.model import Model
from whit.models.open import LIVE, open_model
from whit.models.tokenizer import load_tokenizer
from whit.runtime.answer import SHORTEST_CONTEXT, Generation, Messages, Settings, Timings, check_threads

CHUNK = 256  # tokens of a prompt that go in at once


def described(text: str | Path) -> Model:
    """What `open_model` takes, and folders that `whit.save` wrote. Raises ModelError."""
    folder = Path(text).expanduser()
    if (folder / LIVE).is_file():
        source, n_bytes = open_folder(folder)
        return Model(str(text), read_config(folder), source, n_bytes, tokenizer_dir=folder)
    return open_model(text)


def longest(model: Model) -> int:
    """Tokens that a model reads at most."""
    config = model.config.get("text_config") or model.config
    known = (config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((int(each) for each in known if each), SHORTEST_CONTEXT)


class LiveRuntime:
    """A live model that is loaded: see Runtime.

    model    from `described`
    n_ctx    tokens of prompt and answer together; never more than the model reads
    threads  processor cores to use; None for all that torch would take
    remember keep the tokens of the last conversation: the next question is then read alone
    Raises RecipeError, and ModelError for what cannot be loaded.
    """

    def __init__(self, model: Model, n_ctx: int, threads: int | None = None, remember: bool = False) -> None:
        check_threads(threads)
        self._tokenizer = load_tokenizer(model)
        self.label, self.has_template = model.label, self._tokenizer.has_template
        self._n_ctx, self._threads = min(n_ctx, longest(model)), threads
        self._ends = self._tokenizer.ends() | _ends(model)
        self._remember, self._past = remember, _Past()
        self._module: Any = load(model.label)
        self._last_alone = "logits_to_keep" in signature(self._module.forward).parameters

    def answer(self, prompt: str | Messages, settings: Settings) -> Generation:
        """Continue a text as it stands, or answer a conversation. Raises TooLongError and ModelError while it is read.

        Pieces may be empty: nothing is to be said yet.
        """
        return Generation(self._answer(prompt, settings))

    def resident(self) -> int:
        """Bytes of memory of this process."""
        return int(psutil.Process().memory_info().rss)

    def close(self) -> None:
        """Let the weights go."""
        self._module, self._past = None, _Past()

    def _answer(self, prompt: str | Messages, settings: Settings) -> Generator[str, None, Timings]:
        ids = self._ids(prompt)
        room = self._n_ctx - len(ids)
        if room < 1:
            raise TooLongError(
                f"{self.label}: the prompt has {len(ids)} tokens, the context holds {self._n_ctx}. Shorten the prompt."
            )
        began, known = time.perf_counter(), self._recall(ids)
        logits = torch.empty(0)
        for at in range(known, len(ids), CHUNK):
            yield ""
            logits = self._step(ids[at : at + CHUNK])
        read, tokens, ended = time.perf_counter(), 0, False
        random = torch.Generator().manual_seed(settings.seed)
        writer, stops = self._tokenizer.writer(ids), _Stops(settings.stop)
        while not ended:
            token = drawn(logits, settings, random)
            tokens += 1
            if token in self._ends:
                ended = True
                break
            piece, ended = stops.add(writer.add(token))
            yield piece
            if tokens == min(settings.n_tokens, room):
                break
            if not ended:
                logits = self._step([token])
        piece, stopped = stops.add(writer.rest()) if not stops.met else ("", True)
        yield piece + stops.rest()
        wrote, fresh = time.perf_counter() - read, len(ids) - known
        return Timings(
            prompt_tokens=fresh,
            prompt_tokens_per_second=fresh / max(read - began, 1e-9),
            tokens=tokens,
            tokens_per_second=tokens / max(wrote, 1e-9),
            ended=ended or stopped,
        )

    def _ids(self, prompt: str | Messages) -> list[int]:
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt, add_special=True)
        else:
            text = self._tokenizer.chat(prompt)
            if text is None:
                raise RecipeError(f"{self.label} has no chat template: it continues texts and holds no conversations.")
            ids = self._tokenizer.encode(text)
        if not ids:
            raise RecipeError("The prompt is empty; give the model something to answer or continue.")
        return ids

    def _recall(self, ids: list[int]) -> int:
        """How many of the tokens need not be read again."""
        n = len(self._past.ids)
        if not (self._remember and n < len(ids) and list(self._past.ids) == ids[:n]):
            self._past = _Past()
        return len(self._past.ids)

    def _step(self, ids: Sequence[int]) -> Tensor:
        """Read some tokens: logits [vocab] float32 of the one after them."""
        past, self._past = self._past, _Past()  # an interrupted step leaves nothing half-read behind
        alone = {"logits_to_keep": 1} if self._last_alone else {}
        with torch.inference_mode(), _threads(self._threads):
            out = self._module(input_ids=torch.tensor([ids]), past_key_values=past.cache, use_cache=True, **alone)
        self._past = _Past([*past.ids, *ids], out.past_key_values)
        return out.logits[0, -1].float()


@dataclass(frozen=True)
class _Past:
    """Tokens that were read, and their keys and values in transformers' cache."""

    ids: Sequence[int] = ()
    cache: Any = None


def drawn(logits: Tensor, settings: Settings, random: torch.Generator) -> int:
    """The next token.

    logits  [vocab] float32
    """
    if settings.temperature == 0:
        return int(logits.argmax())
    p = ((logits - logits.max()).double() / settings.temperature).softmax(-1)  # 0 / 1e-300 is 0 in double alone
    if settings.top_p < 1:
        likely, order = p.sort(descending=True, stable=True)
        p = torch.zeros_like(p).scatter(0, order, likely * (likely.cumsum(0) - likely < settings.top_p))
    return int(torch.multinomial(p, 1, generator=random))


@dataclass
class _Stops:
    """Text on its way out, held back while it may be the beginning of a text that ends the answer."""

    stops: tuple[str, ...]
    held: str = ""
    met: bool = False

    def add(self, piece: str) -> tuple[str, bool]:
        """What may go out now, and whether the answer has ended."""
        self.held += piece
        found = [at for at in (self.held.find(each) for each in self.stops) if at >= 0]
        if found:
            out, self.held, self.met = self.held[: min(found)], "", True
            return out, True
        held = max((n for each in self.stops for n in range(1, len(each)) if self.held.endswith(each[:n])), default=0)
        cut = len(self.held) - held
        out, self.held = self.held[:cut], self.held[cut:]
        return out, False

    def rest(self) -> str:
        """What was held back for nothing."""
        out, self.held = self.held, ""
        return out


def _ends(model: Model) -> set[int]:
    """Tokens that end an answer, by the model's configurations."""
    found: list[Any] = [model.config.get("eos_token_id"), model.gguf_metadata.get("tokenizer.ggml.eos_token_id")]
    if model.tokenizer_dir is not None and (model.tokenizer_dir / "generation_config.json").is_file():
        found.append(read_json(model.tokenizer_dir / "generation_config.json").get("eos_token_id"))
    lists = [each if isinstance(each, list) else [each] for each in found]
    return {each for one in lists for each in one if isinstance(each, int)}


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """While the context lasts, torch works on so many cores in this thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
