"""Requests and answers as data; shapes are checked by the types of OpenAI's own client."""

import json

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from whit.runtime.answer import Settings, Timings
from whit.runtime.openai import (
    DONE,
    Asked,
    Refused,
    Shape,
    asked,
    event,
    model_card,
    prompt_of,
    settings_of,
    usage,
    wants_usage,
)

TOOK = Timings(prompt_tokens=7, prompt_tokens_per_second=1.0, tokens=3, tokens_per_second=1.0, ended=True)


def request(body: dict[str, object], chat: bool = False, n_tokens: int = 100, n_answers: int = 1) -> Asked:
    return asked(json.dumps(body).encode(), chat, n_tokens, n_answers)


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({}, 100),
        ({"max_tokens": None}, 100),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 7, "max_tokens": 9}, 7),
        ({"n_predict": 7}, 7),
        ({"n_predict": -1}, 100),
        ({"max_tokens": -1}, 100),
        ({"max_tokens": 10**30}, 100),
    ],
)
def test_one_number_of_tokens_is_left_and_it_is_within_the_limit(given: dict[str, object], allowed: int) -> None:
    body = request({"prompt": "a", "temperature": 0.5, **given}).body
    assert body == {"prompt": "a", "temperature": 0.5, "max_tokens": allowed}


@pytest.mark.parametrize("wrong", [0, -2, 1.5, "7", True, [7]])
def test_other_numbers_of_tokens_are_refused(wrong: object) -> None:
    with pytest.raises(Refused, match="max_tokens is"):
        request({"prompt": "a", "max_tokens": wrong})


def test_answers_are_counted_over_prompts_and_choices() -> None:
    assert request({"prompt": ["a", "b"], "n": 2}, n_answers=4)
    assert request({"prompt": [1, 2, 3, 4, 5, 6]}, n_answers=1)
    for body in (
        {"prompt": ["a", "b"], "n": 3},
        {"prompt": ["a"] * 5},
        {"prompt": "a", "n": 0},
        {"prompt": "a", "n": -9},
        {"prompt": ["a", "b", "c", "d"], "n_cmpl": 4},
        {"prompt": "a", "n_cmpl": 5},
    ):
        with pytest.raises(Refused, match="answers at once"):
            request(body, n_answers=4)


def test_one_number_of_answers_is_left() -> None:
    body = request({"prompt": "a", "n": 2, "n_cmpl": 400}, n_answers=4).body
    assert (body["n"], "n_cmpl" in body) == (2, False)
    assert request({"prompt": "a", "n_cmpl": 3}, n_answers=4).body["n"] == 3


@pytest.mark.parametrize("name", ["logprobs", "top_logprobs", "n_probs"])
def test_likely_tokens_beside_each_one_are_few(name: str) -> None:
    for allowed in (None, 0, 20):
        assert request({"prompt": "a", name: allowed}).body[name] == allowed
    for wrong in (21, 40_000, 40_000.0, -1, "40000", [5]):
        with pytest.raises(Refused, match=f"^{name} is"):
            request({"prompt": "a", name: wrong})


@pytest.mark.parametrize("wrong", [{"echo": True}, {"suffix": "b"}, {"best_of": 3}])
def test_what_no_runtime_does_is_refused_whoever_answers(wrong: dict[str, object]) -> None:
    with pytest.raises(Refused, match=f"^{next(iter(wrong))} is not supported; leave it out.$") as caught:
        request({"prompt": "a", "n": 2, **wrong}, n_answers=4)
    assert (caught.value.status, caught.value.code) == (400, "unsupported_parameter")


def test_what_no_runtime_does_may_be_named_where_it_changes_nothing() -> None:
    neutral = {"echo": False, "suffix": None, "best_of": 2}
    assert request({"prompt": "a", "n": 2, **neutral}, n_answers=4)


def test_a_conversation_may_ask_for_log_probabilities() -> None:
    messages = [{"role": "user", "content": "a"}]
    assert request({"messages": messages, "logprobs": True, "top_logprobs": 5}, chat=True).body["logprobs"] is True


@pytest.mark.parametrize("prompt", [None, 5, {}, [], [1, "a"], [True], [None]])
def test_prompts_that_are_none_are_refused(prompt: object) -> None:
    with pytest.raises(Refused, match="prompt is missing or no text"):
        request({"prompt": prompt})


def test_settings_are_those_of_the_request() -> None:
    body = {"prompt": "a", "temperature": 0.5, "top_p": 0.9, "seed": 5, "stop": "end", "max_tokens": 9, "tools": []}
    assert settings_of(request(body)) == Settings(9, 0.5, 5, 0.9, ("end",))
    plain = settings_of(request({"prompt": "a", "stop": None, "presence_penalty": 0.0}))
    assert (plain.temperature, plain.top_p, plain.stop) == (1.0, 1.0, ())
    assert settings_of(request({"prompt": "a", "stop": ""})).stop == ()
    assert plain.seed != settings_of(request({"prompt": "a"})).seed


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": 10**400},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.1},
        {"stop": [""]},
        {"stop": [5]},
        {"stop": 5},
        {"stop": 0},
        {"stop": {"a": 1}},
        {"seed": 0.5},
        {"seed": 2**63},
        {"seed": 2**70},
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_what_makes_no_sense_is_refused_whoever_answers(wrong: dict[str, object], chat: bool) -> None:
    with pytest.raises(Refused, match=next(iter(wrong))) as caught:
        request({"prompt": "a", "messages": [{"role": "user", "content": "a"}], **wrong}, chat)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "wrong",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": 3},
        {"logit_bias": {"5": 100}},
        {"frequency_penalty": 1},
        {"logprobs": 0},
        {"top_k": False},
        {"grammar": 'root ::= "a"'},
        {"json_schema": {}},
        {"n_probs": 5},
        {"repeat_penalty": 1.3},
        {"guided_regex": "a"},
    ],
)
def test_what_would_be_ignored_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Refused) as caught:
        settings_of(request({"prompt": "a", **wrong}))
    assert caught.value.status == 400
    assert next(iter(wrong)) in caught.value.message
    assert caught.value.code == "unsupported_parameter"


def test_what_no_one_knows_is_not_said_to_work_elsewhere() -> None:
    with pytest.raises(Refused, match="^guided_regex is not known here; leave it out.$"):
        settings_of(request({"prompt": "a", "guided_regex": "a"}))
    with pytest.raises(Refused, match="^grammar is not supported for folders; a GGUF file has it.$"):
        settings_of(request({"prompt": "a", "grammar": "a"}))


def test_what_changes_no_answer_may_be_sent() -> None:
    free = {"user": "me", "metadata": {"a": "b"}, "store": False, "stream_options": {}, "cache_prompt": True, "n": 1}
    neutral = {"repeat_penalty": 1.0, "n_probs": 0, "grammar": "", "json_schema": None, "tools": [], "logprobs": False}
    assert settings_of(request({"model": "m", "prompt": "a", "unheard_of": None, **free, **neutral}))


def test_prompts_and_conversations_are_texts() -> None:
    assert prompt_of(request({"prompt": "a"})) == prompt_of(request({"prompt": ["a"]})) == "a"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "c", "name": "x"}, {"role": "user", "content": parts}]
    assert prompt_of(request({"messages": messages}, chat=True)) == [
        {"role": "system", "content": "c"},
        {"role": "user", "content": "ab"},
    ]
    for body, chat in (
        ({"prompt": [1, 2]}, False),
        ({"prompt": ""}, False),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, True),
        ({"messages": [{"role": "user"}]}, True),
    ):
        with pytest.raises(Refused):
            prompt_of(request(body, chat))


def test_whole_answers_have_openai_s_shape() -> None:
    text = Completion.model_validate_json(Shape(False, "m", 5, "cmpl-1").whole("é", TOOK), strict=True)
    chat = ChatCompletion.model_validate_json(Shape(True, "m", 5, "chatcmpl-1").whole("é", TOOK), strict=True)
    assert (text.choices[0].text, text.choices[0].finish_reason) == ("é", "stop")
    assert (chat.choices[0].message.content, chat.choices[0].message.role) == ("é", "assistant")
    for each in (text, chat):
        assert each.usage is not None
        assert (each.usage.prompt_tokens, each.usage.completion_tokens, each.usage.total_tokens) == (7, 3, 10)


def data(events: list[bytes]) -> list[bytes]:
    assert all(each.startswith(b"data: ") and each.endswith(b"\n\n") and each.count(b"\n") == 2 for each in events)
    return [each[6:-2] for each in events]


def test_streams_have_openai_s_shape() -> None:
    shape = Shape(True, "m", 5, "chatcmpl-1")
    *events, last = [*shape.start(), *shape.pieces("a\n\nb"), *shape.pieces(""), *shape.end(TOOK, with_usage=True)]
    assert last == DONE
    chunks = [ChatCompletionChunk.model_validate_json(each, strict=True) for each in data(events)]
    assert [each.choices[0].delta.content for each in chunks if each.choices] == ["", "a\n\nb", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    texts = Shape(False, "m", 5, "cmpl-1")
    assert texts.start() == []
    *events, last = [*texts.pieces("a"), *texts.end(TOOK, with_usage=False)]
    first, second = (json.loads(each) for each in data(events))  # the client's type knows no piece without an end
    assert first["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]
    assert Completion.model_validate(second, strict=True).choices[0].finish_reason == "stop"
    assert "usage" not in first | second


def test_usage_is_sent_when_it_is_asked_for() -> None:
    assert usage(TOOK)["total_tokens"] == 10
    assert wants_usage(request({"prompt": "a", "stream_options": {"include_usage": True}}))
    for options in ({"include_usage": False}, {}, None, 5):
        assert not wants_usage(request({"prompt": "a", "stream_options": options}))


def test_errors_and_models_have_openai_s_shape() -> None:
    assert Refused(400, "no", "x").body()["error"] == {
        "message": "no",
        "type": "invalid_request_error",
        "param": None,
        "code": "x",
    }
    assert Refused(503, "no").body()["error"]["type"] == "server_error"
    assert Model.model_validate(model_card("m", 5)).id == "m"
    assert data([event({"a": "ü\n"})]) == ['{"a": "ü\\n"}'.encode()]
