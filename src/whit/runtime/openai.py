"""OpenAI's interface as plain data: requests checked and limited, answers and errors in its shapes.

Pure functions between bytes, dictionaries and `Settings`; nothing here listens or computes. What a request may ask for
beyond the limits is cut down (tokens) or refused (answers); whatever is not understood is refused with a sentence, not
ignored, where it would change the answer.
Source: https://platform.openai.com/docs/api-reference, as the official client of version 3 sends it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whit.errors import RecipeError
from whit.runtime.answer import Messages, Settings, Timings

TOKENS = ("max_completion_tokens", "max_tokens", "n_predict")  # names for one thing, the first one holds
ANSWERS = ("n", "n_cmpl")  # likewise
ALTERNATIVES = ("logprobs", "top_logprobs", "n_probs")
MOST_ALTERNATIVES = 20  # OpenAI's number; without one, a short request asks for the whole vocabulary at every token
DONE = b"data: [DONE]\n\n"


class Refused(Exception):
    """A request that gets an error.

    status   of HTTP
    code     OpenAI's word for it, for programs
    """

    def __init__(self, status: int, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def body(self) -> dict[str, Any]:
        """As OpenAI writes errors."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request that was checked.

    chat      whether it is a conversation
    body      as it came, but with the limits in it
    stream    whether the answer is wanted piece by piece
    settings  what the body says of them
    """

    chat: bool
    body: Mapping[str, Any]
    stream: bool
    settings: Settings


def asked(raw: bytes, chat: bool, n_tokens: int, n_answers: int) -> Asked:
    """The request in a body.

    n_tokens   tokens of an answer: at most, and where the request names no number
    n_answers  answers that one request may ask for
    Raises Refused (400) with what is wrong.
    """
    body = _object(raw)
    named = [name for name in TOKENS if body.get(name) is not None]
    wanted = _whole(body, named[0], -1) if named else -1
    if wanted == 0 or wanted < -1:
        raise Refused(400, f"{named[0]} is {wanted}; ask for 1 or more, or leave it out.")
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise Refused(400, f"stream is {stream!r}; it is true or false.")
    counted = [name for name in ANSWERS if body.get(name) is not None]
    choices = _whole(body, counted[0], 1) if counted else 1
    answers = choices * (1 if chat else _prompts(body))
    if chat:
        _messages(body)
    if not 1 <= answers <= n_answers:
        raise Refused(400, f"The request asks for {answers} answers at once; this server gives 1 to {n_answers}.")
    _alternatives(body)
    _nobody(body, choices)
    limited = {name: value for name, value in body.items() if name not in (*TOKENS, *ANSWERS)}
    if counted:
        limited["n"] = choices
    limited["max_tokens"] = n_tokens if wanted == -1 else min(wanted, n_tokens)
    return Asked(chat, limited, stream, _settings(limited))


def _object(raw: bytes) -> dict[str, Any]:
    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no number of JSON")

    try:
        body = json.loads(raw, parse_constant=no_number)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()  # half surrogates and 1e400 pass until here
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise Refused(400, "The body is not a JSON object.")
    return body


def _whole(body: Mapping[str, Any], name: str, least: int) -> int:
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(400, f"{name} is {value!r}; a whole number is needed.")
    return max(value, least - 1)


def _prompts(body: Mapping[str, Any]) -> int:
    """How many prompts there are. Raises Refused."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return 1
    if isinstance(prompt, list) and prompt:
        if all(isinstance(each, int) and not isinstance(each, bool) for each in prompt):
            return 1
        if all(isinstance(each, str | list) for each in prompt):
            return len(prompt)
    raise Refused(400, "prompt is missing or no text; it is a text, a list of texts or a list of token ids.")


def _alternatives(body: Mapping[str, Any]) -> None:
    """Raises Refused for more likely tokens beside each one than an answer may list."""
    for name in ALTERNATIVES:
        value = body.get(name)
        if value is None or (name == "logprobs" and isinstance(value, bool)):
            continue
        if not 0 <= _whole(body, name, 0) <= MOST_ALTERNATIVES:
            raise Refused(400, f"{name} is {str(value)[:40]}; ask for 0 to {MOST_ALTERNATIVES}.")


def _nobody(body: Mapping[str, Any], choices: int) -> None:
    """Raises Refused for what no runtime here does; llama.cpp would not say so."""
    for name, neutral in {"echo": False, "suffix": "", "best_of": choices}.items():
        if body.get(name) is not None and body[name] != neutral:
            raise Refused(400, f"{name} is not supported; leave it out.", "unsupported_parameter")


def _messages(body: Mapping[str, Any]) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, 'messages is missing or empty; it is a list such as [{"role": "user", "content": "Hi"}].')
    for each in messages:
        if not isinstance(each, dict) or not isinstance(each.get("role"), str):
            raise Refused(400, f"messages: {json.dumps(each)[:80]} has no role; give one to every message.")


def _settings(body: Mapping[str, Any]) -> Settings:
    """How an answer is written. Raises Refused for values that make no sense; llama.cpp takes them as it likes."""
    stop = body.get("stop")
    if stop is None or isinstance(stop, str):
        stop = [stop] if stop else []
    if not isinstance(stop, list) or not all(isinstance(each, str) for each in stop):
        raise Refused(400, "stop is a text or a list of texts.")
    seed = body.get("seed")
    if seed is None:
        seed = secrets.randbits(63)  # nobody asked for the same answer twice
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise Refused(400, f"seed is {str(seed)[:40]}; a whole number is needed.")
    try:
        return Settings(body["max_tokens"], _number(body, "temperature"), seed, _number(body, "top_p"), tuple(stop))
    except RecipeError as error:
        raise Refused(400, str(error)) from None


def _number(body: Mapping[str, Any], name: str) -> float:
    value = body.get(name)
    if value is None:
        return 1.0
    try:
        if not isinstance(value, bool) and isinstance(value, int | float):
            return float(value)
    except OverflowError:  # whole numbers of JSON have any length
        pass
    raise Refused(400, f"{name} is {str(value)[:40]}; a number is needed.")


# ---- for a runtime of ours -------------------------------------------------------------------------------------

# What llama.cpp's server has and our own runtime has not. At these values it changes nothing.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "chat_template_kwargs": ({},),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "grammar": ("",),
    "ignore_eos": (False,),
    "json_schema": (),
    "logit_bias": ({}, []),
    "logprobs": (False,),
    "lora": ([],),
    "min_p": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n_probs": (0,),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "reasoning_format": ("none",),
    "repeat_penalty": (1,),
    "response_format": ({"type": "text"},),
    "samplers": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "top_n_sigma": (-1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}

# What is understood, and what programs send that changes no answer: records, caches, and numbers of what is refused.
# fmt: off
_FREE = frozenset({
    "model", "messages", "prompt", "n", "max_tokens", "stream", "stream_options", "temperature", "top_p", "seed",
    "stop", "echo", "suffix", "best_of", "user", "metadata", "store", "service_tier", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "prediction", "parallel_tool_calls", "cache_prompt", "id_slot",
    "timings_per_token", "return_progress", "n_keep", "n_discard", "dry_base", "dry_allowed_length",
    "dry_penalty_last_n", "dry_sequence_breakers", "dynatemp_exponent", "mirostat_tau", "mirostat_eta",
    "repeat_last_n", "xtc_threshold",
})
# fmt: on


def settings_of(request: Asked) -> Settings:
    """How an answer is written. Raises Refused (400) for what only llama.cpp knows, and for what nobody knows."""
    for name, value in request.body.items():
        if value is None or name in _FREE or any(_same(value, each) for each in _WITHOUT.get(name, ())):
            continue
        why = "not supported for folders; a GGUF file has it" if name in _WITHOUT else "not known here; leave it out"
        raise Refused(400, f"{name[:40]} is {why}.", "unsupported_parameter")
    return request.settings


def _same(value: Any, other: Any) -> bool:
    """Equal, as JSON sees it: Python takes 0 for False."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def prompt_of(request: Asked) -> str | Messages:
    """The text to continue, or the conversation. Raises Refused (400) for prompts that are no text."""
    if not request.chat:
        prompt = request.body["prompt"]
        found = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        if not isinstance(found, str):
            raise Refused(400, "prompt: token ids are not supported for folders; give a text.", "unsupported_parameter")
        if not found:
            raise Refused(400, "prompt is empty; give the model something to continue.")
        return found
    return [{"role": each["role"], "content": _text(each.get("content"))} for each in request.body["messages"]]


def _text(content: Any) -> str:
    """The text of a message, which may come in parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    found = [each.get("text") if isinstance(each, dict) and each.get("type") == "text" else None for each in parts]
    if not all(isinstance(each, str) for each in found):
        raise Refused(400, "messages: a content is no text; this model reads text alone.")
    return "".join(each for each in found if each)


# ---- answers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The frame of one answer: what all its parts have in common.

    created  seconds since 1970
    """

    chat: bool
    model: str
    created: int
    id: str

    @classmethod
    def of(cls, request: Asked, model: str, created: int) -> Shape:
        """With an id of its own."""
        return cls(request.chat, model, created, ("chatcmpl-" if request.chat else "cmpl-") + secrets.token_hex(12))

    def whole(self, text: str, took: Timings) -> bytes:
        """The answer in one piece, as JSON."""
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return _json(self._frame(kind, [self._choice(said, _finish(took))], usage(took)))

    def pieces(self, text: str) -> list[bytes]:
        """Server-sent events for one more piece of text; none for an empty one."""
        said: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
        return [self._event([self._choice(said, None)])] if text else []

    def start(self) -> list[bytes]:
        """Events before the first piece."""
        return [self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])] if self.chat else []

    def end(self, took: Timings, with_usage: bool) -> list[bytes]:
        """Events after the last piece."""
        last = self._choice({"delta": {}} if self.chat else {"text": ""}, _finish(took))
        figures = [self._event([], usage(took))] if with_usage else []
        return [self._event([last]), *figures, DONE]

    def _choice(self, said: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _event(self, choices: Sequence[Mapping[str, Any]], figures: Mapping[str, int] | None = None) -> bytes:
        return event(self._frame("chat.completion.chunk" if self.chat else "text_completion", choices, figures))

    def _frame(
        self, kind: str, choices: Sequence[Mapping[str, Any]], figures: Mapping[str, int] | None
    ) -> dict[str, Any]:
        frame = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": list(choices)}
        return frame | ({"usage": dict(figures)} if figures else {})


def wants_usage(request: Asked) -> bool:
    """Whether a stream is to end with the number of tokens."""
    options = request.body.get("stream_options")
    return isinstance(options, Mapping) and options.get("include_usage") is True


def usage(took: Timings) -> dict[str, int]:
    """Tokens, as OpenAI counts them."""
    return {
        "prompt_tokens": took.prompt_tokens,
        "completion_tokens": took.tokens,
        "total_tokens": took.prompt_tokens + took.tokens,
    }


def event(content: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + _json(content) + b"\n\n"


def model_card(name: str, created: int) -> dict[str, Any]:
    """What /v1/models says of a model."""
    return {"id": name, "object": "model", "created": created, "owned_by": "whit"}


def _finish(took: Timings) -> str:
    return "stop" if took.ended else "length"


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()
