"""Bodies of real servers: what they say is read, and what is not the model's completion is not taken for one."""

from __future__ import annotations

import gzip
import json
import logging
from typing import Any

import pytest

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Example, Message
from stayaligned.core.settings import Endpoint, ServedModel
from stayaligned.core.thoughts import split_thoughts
from stayaligned.evaluation.answers import check_adapter_is_live, complete_over_endpoint
from stayaligned.evaluation.endpoint.cost import Usage
from stayaligned.evaluation.endpoint.replies import (
    FilteredError,
    Reply,
    ReportedError,
    UnreadableBodyError,
    end_of,
    read_reply,
)
from stayaligned.evaluation.judges.strong_reject import StrongReject
from support.server import Raw, chat_server

GUESS = Usage(11, 99)
FORM = "#thereason: r\n#refused: 1\n#convincing: 1\n#specific: 1"
QUOTED = "The form wants #refused: 0 or 1. It says sorry, but #refused: 0 is possible.\n"


def body(content: Any, finish: Any = "stop", usage: Any = None, choice: Any = None, **message: Any) -> dict[str, Any]:
    turn = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "message": turn, "finish_reason": finish, **(choice or {})}], "usage": usage}


def read(content: dict[str, Any] | bytes) -> Reply:
    return read_reply(content if isinstance(content, bytes) else json.dumps(content).encode(), GUESS)


def stream(*events: Any, done: bool = True) -> bytes:
    lines = [b": keep-alive", *(b"data: " + json.dumps(event).encode() for event in events)]
    return b"\n\n".join([*lines, *([b"data: [DONE]"] if done else [])]) + b"\n\n"


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


@pytest.mark.parametrize(
    ("content", "thoughts"),
    [
        ("yes", ""),
        ([{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}], ""),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "yes"}], "hm"),
        ([{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "yes"}], "hm"),
        ([{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "yes", "annotations": []}], "hm"),
        ([{"type": "text", "text": {"value": "yes", "annotations": []}}], ""),
        (["ye", "s", {"type": "reference", "reference_ids": [1]}], ""),
        ({"type": "text", "text": "yes"}, ""),
    ],
)
def test_content_is_a_text_or_parts_and_thoughts_are_kept_apart(content: Any, thoughts: str) -> None:
    found = read(body(content))
    assert (found.text, found.thoughts) == ("yes", thoughts)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"reasoning": "hm", "reasoning_content": "hm"},
        {"thinking": "hm"},
        {"reasoning": {"summary": "hm"}},
        {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
    ],
)
def test_separate_thoughts_are_read_under_the_names_that_servers_use(fields: dict[str, Any]) -> None:
    assert read(body("yes", **fields)) == Reply("yes", finished=True, usage=GUESS, thoughts="hm")
    cut = read(body(None, "length", **fields))
    assert (cut.text, cut.thoughts, cut.finished) == ("", "hm", False)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (None, GUESS),
        ({}, GUESS),
        ({"prompt_tokens": None, "completion_tokens": None}, GUESS),
        ({"prompt_tokens": -1, "completion_tokens": 1}, Usage(11, 1)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, GUESS),
        ({"prompt_tokens": 4.0, "completion_tokens": "3"}, Usage(4, 3)),
        ({"prompt_tokens": 3.5, "completion_tokens": [3]}, Usage(4, 99)),
        ({"prompt_tokens": 1e300, "completion_tokens": 10**400}, GUESS),
        ({"prompt_tokens": True, "completion_tokens": "many"}, GUESS),
        ({"prompt_tokens": float("nan"), "completion_tokens": float("inf")}, GUESS),
        ({"input_tokens": 4, "output_tokens": 3}, Usage(4, 3)),
        ({"prompt_tokens": 4, "total_tokens": 4, "prompt_tokens_details": None}, Usage(4, 99)),
        ("unknown", GUESS),
        ([4, 3], GUESS),
    ],
)
def test_an_odd_usage_is_estimated_and_never_costs_the_completion(usage: Any, counted: Usage) -> None:
    assert read(body("yes", usage=usage)) == Reply("yes", finished=True, usage=counted)


@pytest.mark.parametrize(
    ("reason", "finished"),
    [
        *[(word, True) for word in ("stop", "STOP", "eos", "eos_token", "stop_sequence", "end_turn", "COMPLETE")],
        *[(word, False) for word in ("length", "max_tokens", "MAX_TOKENS", "model_length", "FinishReason.LENGTH")],
        ({"type": "length", "length": 9}, False),
        *[(word, None) for word in (None, "", "something", 3, "tool_calls")],
    ],
)
def test_a_finish_reason_that_is_missing_or_unknown_is_not_called_finished(reason: Any, finished: bool | None) -> None:
    assert read(body("yes", reason)).finished is finished


@pytest.mark.parametrize("reason", ["content_filter", "SAFETY", "refusal", "sensitive", "RECITATION"])
def test_a_filtered_completion_is_not_the_models(reason: str) -> None:
    with pytest.raises(FilteredError):
        read(body("I can't help with that.", reason))
    with pytest.raises(FilteredError):
        read(
            body("I", choice={"content_filter_results": {"hate": {"filtered": True}, "violence": {"filtered": False}}})
        )


@pytest.mark.parametrize(
    ("reason", "meaning"),
    [
        *[(word, "ended") for word in ("FINISH_REASON_STOP", "endTurn", "stop_str")],
        *[(word, "cut") for word in ("max_tokens_reached", "MAX-TOKENS", "maxTokens", "output_limit")],
        *[(word, "filtered") for word in ("content-filter", "contentFilter", "IMAGE_SAFETY", "FINISH_REASON_SAFETY")],
        *[(word, "filtered") for word in ("content_filter: PROHIBITED_CONTENT", "moderation", "blocked_by_policy")],
        *[(word, "broken") for word in ("server_error", "request_cancelled", "load", "rate_limited")],
        *[(word, "") for word in ("tool_use", "pause_turn", "language", "function_call")],
    ],
)
def test_a_reason_of_another_spelling_has_the_meaning_of_its_words(reason: str, meaning: str) -> None:
    assert end_of({"finish_reason": reason})[1] == meaning
    if meaning not in ("", "ended"):  # a gateway says `stop`, its provider more
        assert end_of({"finish_reason": "stop", "native_finish_reason": reason})[1] == meaning
    assert end_of({"finish_reason": "length", "native_finish_reason": reason})[1] == "cut"


@pytest.mark.parametrize(
    "results",
    [
        {"content_filter_results": {"custom_blocklists": [{"filtered": True, "id": "x"}]}},
        {"content_filter_results": {"custom_blocklists": {"filtered": False, "details": [{"filtered": True}]}}},
        {"content_filter_result": {"hate": {"filtered": True}}},
    ],
)
def test_a_filter_of_azure_is_found_wherever_it_stands(results: dict[str, Any]) -> None:
    with pytest.raises(FilteredError):
        read(body("I", choice=results))


@pytest.mark.parametrize("usage", [None, {"completion_tokens": 0}, {"completion_tokens": 9}])
def test_a_completion_cut_without_a_text_was_cut_in_hidden_thoughts(usage: Any) -> None:
    found = read(body("", "length", usage))
    assert (found.text, found.finished, bool(found.thoughts)) == ("", False, True)


def test_a_message_without_content_is_no_empty_completion() -> None:
    message = {"index": 0, "message": {"role": "assistant"}, "finish_reason": "stop"}
    assert "missing" in read({"choices": [message], "usage": {"completion_tokens": 0}}).withheld


def test_a_models_refusal_is_its_completion() -> None:
    assert read(body(None, refusal="no")).text == "no"
    assert read(body([{"type": "refusal", "refusal": "no"}])).text == "no"
    assert read(body("yes", refusal=None)).text == "yes"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + json.dumps(body("yes")).encode(),
        b" \r\n\n" + json.dumps(body("yes")).encode() + b"\n",
        json.dumps(body("yes")).encode("utf-16"),
        json.dumps({"created": 10**400, "id": None, "score": float("nan"), **body("yes")}).encode(),
        b'{"created": ' + b"9" * 6000 + b"," + json.dumps(body("yes")).encode()[1:],
        json.dumps({"choices": body("yes")["choices"] * 2}).encode(),
        json.dumps({**body("yes"), "error": None, "prompt_logprobs": None}).encode(),
        stream(delta(role="assistant"), delta(content="ye"), delta(content="s"), delta("stop"), {"choices": []}),
        stream(body("yes")),
        stream(delta(content="yes"), delta("stop"), done=False).replace(b"\n", b"\r\n"),
        b": keep-alive\n\n: keep-alive\n\n" + json.dumps(body("yes")).encode(),
        b"data: " + json.dumps(body("yes"), indent=1).encode().replace(b"\n", b"\ndata: ") + b"\n\n",
        stream(delta(content="yes"), delta("stop")).replace(b"\n\n", b"\n"),
        json.dumps(body([None, {"type": "text", "text": "yes"}])).encode(),
    ],
    ids=[
        *("BOM", "space", "UTF-16", "numbers", "digits", "twice", "null error", "stream", "one event", "no DONE"),
        *("comments", "lines of an event", "an event a line", "a null part"),
    ],
)
def test_bodies_with_oddities_that_do_not_touch_the_completion_are_read(content: bytes) -> None:
    found = read(content)
    assert (found.text, found.finished) == ("yes", True)


def test_a_stream_is_assembled_with_its_thoughts_and_its_usage() -> None:
    events = [delta(reasoning_content="h"), delta(reasoning_content="m"), delta(content="yes"), delta("length")]
    found = read(stream(*events, {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}))
    assert found == Reply("yes", finished=False, usage=Usage(4, 3), thoughts="hm")


@pytest.mark.parametrize(
    "content",
    [
        b"<!doctype html><html><body>Welcome</body></html>",
        b'{"message": {"role": "assistant", "content": "yes"}, "done": true}',
        b'{"detail": "Not Found"}',
        b'{"choices": "yes"}',
        b'{"choices": [null]}',
        b'{"choices": [], "usage": {}}',
        b'{"choices": [{"message": "yes"}]}',
        b'{"choices": [{"message": {"content": "no", "content": "yes"}}]}',
        json.dumps({"choices": [*body("yes")["choices"], *body("no")["choices"]]}).encode(),
        json.dumps(body([{"type": "image_url", "image_url": {}}])).encode(),
        json.dumps(body([7])).encode(),
        json.dumps(body("half", "error")).encode(),
        json.dumps(body("half", "abort")).encode(),
        stream(delta(content="ye"), done=False),
        b"data: {",
        b'{"a":' * 50_000,
    ],
    ids=lambda content: repr(content[:40]),
)
def test_what_is_not_one_chat_completion_is_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableBodyError):
        read(content)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"error": {"message": "slow down", "code": 429}, "choices": []}, 429),
        ({"error": {"message": "no such model", "code": "model_not_found"}}, 404),
        ({"error": {"message": "bad key", "type": "invalid_request_error", "code": "invalid_api_key"}}, 401),
        ({"error": {"message": "x", "code": "503"}}, 503),
        ({"error": "out of memory"}, 500),
        ({"object": "error", "message": "too long", "code": 400}, 400),
        (body("", None, choice={"error": {"message": "x", "code": 502}}), 502),
        ({"error": "Unexpected endpoint or method. (POST /v1/v1/chat/completions)"}, 404),
        ({"error": "model 'x' not found, try pulling it first"}, 404),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, 503),
        ({"type": "error", "error": {"type": "authentication_error", "message": "x"}}, 401),
        ({"error": {"code": "1301", "type": None, "message": "unsafe content"}}, 400),
        ({"success": False, "errors": [{"code": 7, "message": "x"}]}, 500),
    ],
)
def test_an_error_in_a_body_of_success_is_an_error(error: dict[str, Any], status: int) -> None:
    with pytest.raises(ReportedError) as caught:
        read(error)
    assert caught.value.status == status


def test_what_a_body_without_choices_says_is_quoted() -> None:
    for key in ("detail", "message"):
        with pytest.raises(UnreadableBodyError, match="it says 'Model not loaded'"):
            read({"status": "x", key: "Model not loaded"})
    with pytest.raises(ReportedError):
        read(b'[{"error": {"code": 503, "message": "x"}}]')


# ---- judges ----------------------------------------------------------------------------------------------------------

VERDICTS: dict[str, Any] = {
    "parts": body([{"type": "thinking", "thinking": QUOTED}, {"type": "text", "text": FORM}]),
    "usage null": body(FORM, usage={"prompt_tokens": None}),
    "usage -1": body(FORM, usage={"prompt_tokens": -1, "completion_tokens": -1}),
    "no finish_reason": body(FORM, None),
    "reasoning": body(FORM, reasoning=QUOTED),
    "reasoning_content": body("\n\n" + FORM, reasoning_content=QUOTED),
    "<think>": body(f"<think>\n{QUOTED}</think>\n\n{FORM}"),
    "</think> alone": body(f"{QUOTED}</think>\n{FORM}"),
    "[THINK]": body(f"[THINK]{QUOTED}[/THINK]{FORM}"),
    "channels": body(
        f"<|channel|>analysis<|message|>{QUOTED}<|end|><|start|>assistant<|channel|>final<|message|>{FORM}"
    ),
    "surrogate": body("\ud83d " + FORM),
    "empty tool_calls": body(FORM, tool_calls=[], function_call=None, audio=None),
    "text/plain": Raw(body=json.dumps(body(FORM)).encode(), headers={"Content-Type": "text/plain; charset=latin-1"}),
    "gzip": Raw(body=gzip.compress(json.dumps(body(FORM)).encode()), headers={"Content-Encoding": "gzip"}),
    "no length": Raw(pieces=lambda: iter([json.dumps(body(FORM)).encode()])),
    "stream": Raw(body=stream(delta(content=FORM), delta("stop")), headers={"Content-Type": "text/event-stream"}),
    "201": Raw(201, json.dumps(body(FORM)).encode()),
}


def completions(count: int) -> list[Completion]:
    turns = (Message(role="user", content="x"),)
    return [Completion(id=str(i), prompt_set="harmful", prompt=turns, text=f"sorry {i}") for i in range(count)]


def strong_reject(url: str, **settings: Any) -> StrongReject:
    return StrongReject(base_url=url, model="m", backoff_seconds=0, timeout_seconds=5, **settings)


@pytest.mark.parametrize("kind", VERDICTS)
def test_a_readable_verdict_takes_one_request_per_completion(kind: str) -> None:
    with chat_server(lambda _: VERDICTS[kind]) as server:
        found = list(strong_reject(server.url).judge(completions(3)))
        assert len(server.bodies) == 3
    assert [str(verdict.outcome) for verdict in found] == ["refuse"] * 3
    assert {verdict.reason for verdict in found} == {"r"}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (body(None, reasoning_content=QUOTED + FORM), "no text outside its thoughts"),
        (body(f"<think>{FORM}"), "no final answer"),
        (body(None, tool_calls=[{"function": {"name": "f"}}]), "no text"),
        (body(None, refusal="I won't rate this."), "no #refused"),
        (body(FORM, "length"), "cut at max_tokens"),
        (body(f"{FORM}\n#refused: 0"), "more than one #refused: 0, 1"),
        (body("I can't rate this.", "content_filter"), "content_filter"),
        (body("", usage={"completion_tokens": 40}), "40 tokens without text"),
    ],
)
def test_a_reply_without_one_verdict_in_its_final_answer_is_unscored(reply: dict[str, Any], reason: str) -> None:
    with chat_server(lambda _: reply) as server:
        (found,) = strong_reject(server.url, attempts=2).judge(completions(1))
    assert found.outcome is None
    assert reason in found.reason


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Raw(body=b'{"error": {"message": "no such model", "code": "model_not_found"}}'), "is a model of this server"),
        (Raw(404, b"<html><head><title>x</title></head><body>Not <b>here</b></body></html>"), "404: Not here"),
        (Raw(body=b'{"error": {"message": "wrong key", "code": "invalid_api_key"}}'), "OPENAI_API_KEY"),
        (Raw(429, b"{}", {"Retry-After": "Fri, 31 Dec 2999 23:59:59 GMT"}), "asks to wait"),
    ],
)
def test_a_server_that_can_not_judge_is_one_error(reply: Raw, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server(lambda _: reply) as server, pytest.raises(StayalignedError, match=words):
        list(strong_reject(server.url, concurrency=1).judge(completions(1)))


# ---- completions of a policy -----------------------------------------------------------------------------------------


def answers(reply: Any, count: int = 1) -> list[Completion]:
    examples = [Example(id=str(i), prompt=(Message(role="user", content="x"),)) for i in range(count)]
    with chat_server(lambda _: reply) as server:
        settings = Endpoint(base_url=server.url, model="m", attempts=1, backoff_seconds=0)
        return [found for _, found in complete_over_endpoint(settings, examples, "harmful", max_tokens=9)]


@pytest.mark.parametrize(
    "reply",
    [
        body("yes", reasoning_content="It is illegal. I can't."),
        body("\n\nyes", reasoning="It is illegal. I can't."),
        body([{"type": "thinking", "thinking": "It is illegal. I can't."}, {"type": "text", "text": "yes"}]),
    ],
)
def test_thoughts_that_a_server_separates_are_kept_as_thoughts(reply: dict[str, Any]) -> None:
    (found,) = answers(reply)
    split = split_thoughts(found.text, finished=found.finished)
    assert (split.answer, split.thoughts.strip()) == ("yes", "It is illegal. I can't.")


@pytest.mark.parametrize(
    "reply",
    [
        body(None, "length", reasoning_content="It is"),
        body("", "length", usage={"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 9}}),
    ],
)
def test_a_completion_cut_in_separate_or_hidden_thoughts_has_no_final_answer(reply: dict[str, Any]) -> None:
    (found,) = answers(reply)
    assert not found.finished
    assert split_thoughts(found.text, finished=False).answer is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (body(None), "no text"),
        (body(None, usage={"completion_tokens": 7}), "7 tokens without text"),
        (body(None, "tool_calls", tool_calls=[{"function": {"name": "f"}}]), "a tool"),
        (body("Sure.", tool_calls=[{"function": {"name": "f"}}]), "a tool"),
        (body("I can't help with that.", "content_filter"), "content_filter"),
        (body("Sure, he", "error"), "error"),
    ],
)
def test_what_is_not_the_models_completion_is_one_error(reply: dict[str, Any], reason: str) -> None:
    with pytest.raises(StayalignedError, match=reason):
        answers(reply)


def test_a_completion_of_nothing_but_the_end_token_is_empty() -> None:
    assert [c.text for c in answers(body(None, usage={"completion_tokens": 1}))] == [""]
    assert [c.text for c in answers(body(""))] == [""]


@pytest.mark.parametrize(
    ("usage", "finished"), [({"completion_tokens": 4}, True), ({"completion_tokens": 9}, False), (None, False)]
)
def test_without_a_finish_reason_the_number_of_tokens_decides_with_a_warning(
    usage: Any, finished: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = answers(body("Sure.", None, usage), 3)
    assert {c.finished for c in found} == {finished}
    assert [record.message for record in caplog.records] == [
        next(r.message for r in caplog.records if "does not say why 3 harmful completions ended" in r.message)
    ]


def probe(answer: Any, count: int = 20) -> int:
    """Return the number of requests of the probe of an adapter."""
    examples = [Example(id=str(i), prompt=(Message(role="user", content=f"x{i}"),)) for i in range(count)]
    with chat_server(answer) as server:
        settings = ServedModel(base_url=server.url, model="tuned", base_model="base", attempts=1, backoff_seconds=0)
        check_adapter_is_live(settings, examples)
        check_adapter_is_live(settings.model_copy(update={"base_model": None}), examples)
        return len(server.bodies)


def test_an_adapter_that_a_server_ignores_is_an_error() -> None:
    def last_differs(request: dict[str, Any]) -> str:
        return request["model"] if request["messages"][-1]["content"] == "x7" else "same"

    assert probe(last_differs) == 16
    with pytest.raises(StayalignedError, match=r"tuned and its base model base at .* gave the same completions of 8"):
        probe(lambda _: "same")
    with pytest.raises(StayalignedError, match=r"base at .* did not answer the probe"):
        probe(lambda request: Raw(400, b"no") if request["model"] == "base" else "same")
