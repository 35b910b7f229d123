"""OpenAI's interface as plain data: requests checked and limited, answers and errors in its shapes.

Pure functions between bytes, dictionaries and `Settings`; nothing here listens or computes. What a request may ask for
beyond the limits is cut down (tokens) or refused (answers); whatever is not understood is refused with a sentence, not
ignored, where it would change the answer.
Source: https://platform.openai.com/docs/api-reference, as the official client of version 3 sends it.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whit.errors import RecipeError
from whit.runtime.answer import Messages, Settings, Timings

TOKENS = ("max_completion_tokens", "max_tokens", "n_predict")  # names for one thing, the first one holds
ANSWERS = ("n", "n_cmpl")  # the same
ALTERNATIVES = ("logprobs", "top_logprobs", "n_probs")
MOST_ALTERNATIVES = 20  # tokens that an answer may list for each of its own: OpenAI's limit
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

    chat     whether it is a conversation
    body     as it came, but with the limits in it
    stream   whether the answer is wanted piece by piece
    """

    chat: bool
    body: Mapping[str, Any]
    stream: bool


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
    choices = max([_whole(body, name, 1) for name in ANSWERS if body.get(name) is not None], default=1)
    answers = choices * (1 if chat else _prompts(body))
    if chat:
        _messages(body)
    if not 1 <= answers <= n_answers:
        raise Refused(400, f"The request asks for {answers} answers at once; this server gives 1 to {n_answers}.")
    for name in ALTERNATIVES:
        if isinstance(body.get(name), int | float) and body[name] > MOST_ALTERNATIVES:
            raise Refused(400, f"{name} is {body[name]}; at most {MOST_ALTERNATIVES} are listed.")
    for name, neutral in _NOWHERE.items():
        if body.get(name) is not None and not _among(body[name], neutral):
            raise Refused(400, f"{name} is not supported.", "unsupported_parameter")
    limited = {name: value for name, value in body.items() if name not in TOKENS}
    limited["max_tokens"] = n_tokens if wanted == -1 else min(wanted, n_tokens)
    _settings(limited)  # what makes no sense is refused for every runtime
    return Asked(chat, limited, stream)


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


def _messages(body: Mapping[str, Any]) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, 'messages is missing or empty; it is a list such as [{"role": "user", "content": "Hi"}].')
    for each in messages:
        if not isinstance(each, dict) or not isinstance(each.get("role"), str):
            raise Refused(400, f"messages: {json.dumps(each)[:80]} has no role; give one to every message.")


def _settings(body: Mapping[str, Any]) -> Settings:
    """How an answer is written. Raises Refused (400) for values that make no sense."""
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(each, str) for each in stop):
        raise Refused(400, "stop is a text or a list of texts.")
    seed = body.get("seed")
    if seed is None:
        seed = secrets.randbits(63)  # nobody asked for the same answer twice
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise Refused(400, f"seed is {str(seed)[:40]}; a whole number of at most 64 bits is needed.")
    try:
        return Settings(body["max_tokens"], _number(body, "temperature"), seed, _number(body, "top_p"), tuple(stop))
    except RecipeError as error:
        raise Refused(400, str(error)) from None


def _number(body: Mapping[str, Any], name: str) -> float:
    value = body.get(name)
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused(400, f"{name} is {str(value)[:40]}; a number is needed.")
    return float(value)


def _among(value: Any, others: Sequence[Any]) -> bool:
    """Whether it equals one of them; False is not 0 here."""
    return any(isinstance(value, bool) is isinstance(each, bool) and value == each for each in others)


# What OpenAI's interface has and no runtime here. At these values it changes nothing.
_NOWHERE: dict[str, tuple[Any, ...]] = {"best_of": (1,), "echo": (False,), "suffix": ("",)}


# ---- for a runtime of ours -------------------------------------------------------------------------------------

# What OpenAI's interface has and our own runtime has not. At these values it changes nothing.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "top_logprobs": (0,),
}
# What changes nothing in an answer of a folder, or is heeded.
_KNOWN = {
    *("model", "messages", "prompt", "stream", "stream_options", "stop", "seed", "temperature", "top_p", "max_tokens"),
    *ANSWERS, *_NOWHERE, *_WITHOUT,
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
    *("prompt_cache_retention", "cache_prompt", "id_slot", "timings_per_token", "return_progress"),
}  # fmt: skip


def settings_of(request: Asked) -> Settings:
    """How an answer is written. Raises Refused (400) for values that make no sense, or that only llama.cpp knows."""
    body = request.body
    for name, neutral in _WITHOUT.items():
        if body.get(name) is not None and not _among(body[name], neutral):
            raise Refused(400, f"{name} is not supported for folders; a GGUF file has it.", "unsupported_parameter")
    unknown = sorted(name for name, value in body.items() if name not in _KNOWN and value is not None)
    if unknown:
        raise Refused(400, f"{', '.join(unknown)}: not known here, for folders.", "unsupported_parameter")
    return _settings(body)


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
