"""The body of a server's reply, read as a chat completion: OpenAI's format, and what common servers make of it.

Only what is read must have the right form: a reply with an odd `usage` or an odd `created` still holds the completion.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stayaligned.evaluation.endpoint.cost import Usage

_FINISH_REASONS = {
    "ended": "stop stop_str eos eos_token stop_token stop_sequence stop_sequences end_turn end complete completed "
    "finished done",
    "cut": "length max_length max_tokens max_new_tokens max_output_tokens max_completion_tokens model_length "
    "token_limit model_context_window_exceeded context_length_exceeded",
    "filtered": "content_filter content_filtered filtered safety refusal sensitive blocked blocklist "
    "prohibited_content recitation spii guardrail_intervened moderation",
    "broken": "error abort aborted cancelled canceled timeout network_error insufficient_system_resource "
    "malformed_function_call incomplete load unload",
}
"""Values of `finish_reason` of OpenAI, vLLM, SGLang, TGI, Mistral, DeepSeek, Zhipu, Anthropic and Google."""
_FINISH_FIELDS = (
    *("finish_reason", "stop_reason", "done_reason", "finish_reasons"),
    *("finishReason", "stopReason", "finishreason", "stopreason"),  # in lower case, as columns are compared
)
_MEANINGS = {word: meaning for meaning, words in _FINISH_REASONS.items() for word in words.split()}
_PARTS_OF_REASONS = (
    ("filtered", re.compile(r"filter|safety|prohibited|blocked|sensitive|moderation")),
    ("broken", re.compile(r"error|abort|cancel|timeout|rate_limit")),
    ("cut", re.compile(r"max_|length|limit")),
)
"""Parts of reasons that are not in the list above."""
_ERROR_CODES = {
    code: status
    for status, codes in {
        400: "content_filter context_length_exceeded invalid_request_error invalid_argument data_inspection_failed "
        "badrequesterror 1301",
        401: "invalid_api_key invalidapikey authentication_error unauthenticated",
        402: "insufficient_credits",
        403: "permission_error permission_denied",
        404: "model_not_found not_found_error not_found notfounderror",
        429: "rate_limit_exceeded rate_limit_error resource_exhausted insufficient_quota",
        503: "overloaded overloaded_error unavailable_error",
    }.items()
    for code in codes.split()
}
_ERROR_WORDS = (
    (404, re.compile(r"not found|no such model|unknown model|does not exist|unexpected endpoint|no models loaded")),
    (401, re.compile(r"api[ _-]?key|unauthori[sz]ed|authentication")),
    (429, re.compile(r"rate limit|too many requests")),
)
"""Words of errors without a code."""
_THOUGHT_PARTS = frozenset(("thinking", "reasoning", "reasoning_content", "reasoning.text", "redacted_thinking"))
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
"""Fields of a message with the model's thoughts; a server that fills several repeats them, so the first is read."""
_MESSAGES = ("message", "detail", "msg", "error_message")
_SENT = ("prompt_tokens", "input_tokens")
_RECEIVED = ("completion_tokens", "output_tokens")
_MOST_TOKENS = 10**7
"""Largest believable number of tokens of one request."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A usable reply of the server."""

    text: str
    """The model's completion, without thoughts that the server returns separately."""
    finished: bool | None
    """False if the completion was cut at the token limit; None if the server does not say."""
    usage: Usage
    """Tokens as reported by the server; estimated if the server does not report them."""
    requests: int = 1
    """Number of attempts."""
    thoughts: str = ""
    """The model's thoughts, from a server that separates them from the completion."""
    withheld: str = ""
    """If there is neither text nor thoughts, what the model wrote instead; empty for an empty completion."""
    calls_tools: bool = False
    """Whether the completion also calls a tool, although none was offered."""


class UnreadableBodyError(Exception):
    """The body is not a chat completion."""


class FilteredError(Exception):
    """The server removed part or all of the completion, so it is not what the model wrote."""


class ReportedError(Exception):
    """The body reports an error although the status is one of success; `status` is the one that it should be."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def read_reply(content: bytes, estimate: Usage) -> Reply:
    """Read the body of a reply with a status of success.

    Args:
        content: the body: one JSON object, or the events of a stream.
        estimate: the tokens to assume where the server does not report them.

    Raises:
        UnreadableBodyError: if it is not one chat completion.
        FilteredError: if the server filtered the completion.
        ReportedError: if it reports an error.
    """
    body = _parse(content)
    choice = _only_choice(body)
    reason, meaning = end_of(choice)
    if meaning == "filtered" or _has_filtered_part(choice):
        raise FilteredError
    if meaning == "broken":
        raise UnreadableBodyError(f"the server stopped the completion ({reason})")
    message = choice.get("message", {"content": choice.get("text")})
    if not isinstance(message, Mapping):
        raise UnreadableBodyError("`message` is not an object")
    text, thoughts, refusal = _read_content(message.get("content"))
    refusal = refusal or (message.get("refusal") if isinstance(message.get("refusal"), str) else "")
    text = "\n".join(filter(None, (text, refusal)))
    thoughts = thoughts or next(filter(None, (_flat_text(message.get(field)) for field in _THOUGHT_FIELDS)), "")
    counts = _mapping(body.get("usage"))
    received = _count(counts, _RECEIVED)
    hidden = _count(_mapping(counts.get("completion_tokens_details")), ("reasoning_tokens",))
    if (hidden or meaning == "cut") and not text and not thoughts:  # cut without a text: in its thoughts
        thoughts = f"[{hidden or received or 'all'} tokens that the server does not show]"
    return Reply(
        text=text,
        finished={"ended": True, "cut": False}.get(meaning),
        usage=Usage(
            _count(counts, _SENT) or estimate.input_tokens,
            estimate.output_tokens if received is None or (received == 0 and text) else received,
        ),
        thoughts=thoughts,
        withheld="" if text or thoughts else _withheld(message, received),
        calls_tools=bool(message.get("tool_calls") or message.get("function_call")),
    )


def parse_json(content: bytes) -> Any:
    """Return the JSON value of a body, in any of JSON's encodings, with or without a byte order mark.

    Raises:
        ValueError: if it is not JSON, nested too deeply, or two different values have the same key.
    """
    try:
        text = content.decode(json.detect_encoding(content)).strip().removeprefix("\ufeff")
        return json.loads(text, parse_int=_parse_int, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 300 else float(digits)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"two different values of {key[:40]!r}")
        found[key] = value
    return found


def _parse(content: bytes) -> Mapping[str, Any]:
    """Return the body as an object with `choices`, also from a stream that was not asked for."""
    start = content.lstrip()[:16]
    if start.startswith(b"<"):
        raise UnreadableBodyError("the server returned a web page")
    content = re.sub(rb"\A(?:\s*:[^\n]*\n)+\s*(?=\{)", b"", content)  # comments that keep a connection alive
    if content.lstrip().startswith((b"data:", b"event:", b"id:", b": ", b":\n")):
        return _assemble(content)
    try:
        body = parse_json(content)
    except ValueError as error:
        raise UnreadableBodyError(f"not JSON: {str(error)[:200]}") from None
    body = body[0] if isinstance(body, list) and len(body) == 1 else body
    if not isinstance(body, Mapping):
        raise UnreadableBodyError(f"the body is of type {type(body).__name__}")
    _raise_reported(body)
    return body


def _raise_reported(body: Mapping[str, Any]) -> None:
    """Raise the error that a body reports instead of a completion."""
    error = body.get("error") or (body if body.get("object") == "error" or body.get("success") is False else None)
    if error:
        raise ReportedError(_error_status(error))


def _error_status(error: object) -> int:
    for code in (_mapping(error).get(name) for name in ("code", "status", "type")):
        text = str(code).strip().casefold()
        status = int(text) if text.isdecimal() and len(text) == 3 else _ERROR_CODES.get(text)
        if status is not None and 400 <= status < 600:
            return status
    said = str(_mapping(error).get("message", "") if isinstance(error, Mapping) else error).casefold()
    return next((status for status, words in _ERROR_WORDS if words.search(said)), 500)


def _assemble(content: bytes) -> Mapping[str, Any]:
    """Return the completion of a stream of server-sent events, in the form of a body that was not streamed."""
    choices: dict[Any, dict[str, Any]] = {}
    usage: Any = None
    ended = False
    for data in _events(content):
        if data.strip() == b"[DONE]":
            ended = True
            break
        try:
            event = parse_json(data)
        except ValueError as error:
            raise UnreadableBodyError(f"an event of the stream is not JSON: {error}") from None
        if not isinstance(event, Mapping):
            raise UnreadableBodyError("an event of the stream is not an object")
        _raise_reported(event)
        usage = event.get("usage") or usage
        for part in event.get("choices") or ():
            if isinstance(part, Mapping):
                _extend(choices.setdefault(part.get("index", 0), {"message": {}}), part)
    if not ended and any(choice.get("finish_reason") is None for choice in choices.values()):
        raise UnreadableBodyError("the stream ended early")
    return {"choices": [*choices.values()], "usage": usage}


def _events(content: bytes) -> Iterator[bytes]:
    """Yield the data of each event, whose lines are joined."""
    for event in re.split(rb"(?:\r\n|\n|\r){2,}", content):
        fields = [line.partition(b":") for line in event.splitlines()]
        lines = [data for name, _, data in fields if name.strip() == b"data"]
        whole = b"\n".join(lines)
        # Some servers write one event a line.
        yield from [whole] if lines and (len(lines) == 1 or _is_json(whole)) else lines


def _is_json(content: bytes) -> bool:
    try:
        parse_json(content)
    except ValueError:
        return False
    return True


def _extend(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add one event of a stream to the choice that it belongs to."""
    choice.update({key: value for key, value in part.items() if key not in ("delta", "message") and value is not None})
    delta = part.get("delta") or part.get("message")
    for key, value in delta.items() if isinstance(delta, Mapping) else ():
        if isinstance(value, str | list) and isinstance(choice["message"].get(key), type(value)):
            choice["message"][key] += value
        elif value is not None:
            choice["message"][key] = value


def _only_choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the choice; one was asked for, so several must be equal."""
    choices = body.get("choices")
    if not isinstance(choices, Sequence) or not choices or not all(isinstance(one, Mapping) for one in choices):
        said = next((value for key in _MESSAGES if isinstance(value := body.get(key), str) and value.strip()), "")
        raise UnreadableBodyError(
            f"`choices` is missing or empty; its fields are {', '.join([*body][:8]) or 'none'}"
            + (f"; it says {said.strip()[:200]!r}" if said else "")
        )
    first = choices[0]
    if any({**one, "index": 0} != {**first, "index": 0} for one in choices[1:]):
        raise UnreadableBodyError(f"{len(choices)} different choices, where one was asked for")
    if first.get("error"):
        raise ReportedError(_error_status(first["error"]))
    return first


def end_of(found: Mapping[str, Any]) -> tuple[str, str]:
    """Return why a completion ended, as a server or a tool says, and what that means.

    The meaning is `ended`, `cut`, `filtered` or `broken`, or empty if the reason is missing or unknown.
    """
    value = next((found[name] for name in _FINISH_FIELDS if found.get(name)), None)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    value = value.get("type") if isinstance(value, Mapping) else value
    found_meaning = _meaning_of(value)
    native = _meaning_of(
        found.get("native_finish_reason")
    )  # OpenRouter says `stop` of what its provider cut or blocked
    return native if native[1] not in ("", "ended") and found_meaning[1] in ("", "ended") else found_meaning


def _meaning_of(value: object) -> tuple[str, str]:
    """Return a reason in lower case, with underscores between its words, and its meaning; empty if it is unknown."""
    if not isinstance(value, str):
        return "", ""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", value.rpartition(".")[2].strip())
    reason = re.sub(r"[\W_]+", "_", words).strip("_").lower().removeprefix("finish_reason_")
    by_part = next((meaning for meaning, part in _PARTS_OF_REASONS if part.search(reason)), "")
    return reason, _MEANINGS.get(reason, by_part)


def _has_filtered_part(choice: Mapping[str, Any]) -> bool:
    def is_filtered(part: object) -> bool:
        if isinstance(part, Mapping):
            return part.get("filtered") is True or any(map(is_filtered, part.values()))
        return isinstance(part, list) and any(map(is_filtered, part))

    return any(is_filtered(choice.get(name)) for name in ("content_filter_results", "content_filter_result"))


def _read_content(content: object) -> tuple[str, str, str]:
    """Return the text, the thoughts and the refusal in a message's `content`: a text, or a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", "", ""
    found = {"text": "", "thoughts": "", "refusal": ""}
    for part in content if isinstance(content, list) else [content]:
        if part is None:
            continue
        if isinstance(part, str):
            found["text"] += part
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind in ("text", "output_text") and isinstance(part, Mapping):
            text = part.get("text")
            text = text.get("value") if isinstance(text, Mapping) else text
            if not isinstance(text, str):
                raise UnreadableBodyError("a part of `content` has no text")
            found["text"] += text
        elif kind in _THOUGHT_PARTS:
            found["thoughts"] += _flat_text(part)
        elif kind == "refusal":
            found["refusal"] += _flat_text(part)
        elif kind != "reference":
            raise UnreadableBodyError(f"a part of `content` is of the type {str(kind)[:40]!r}")
    return found["text"], found["thoughts"], found["refusal"]


def _flat_text(value: object) -> str:
    """Return all text in a nested value of thoughts: a text, or parts with texts."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        keys = ("thinking", "reasoning", "reasoning_content", "refusal", "text", "summary", "content")
        return next(filter(None, (_flat_text(value.get(key)) for key in keys)), "")
    return "".join(map(_flat_text, value)) if isinstance(value, list) else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(found: Mapping[str, Any], names: Sequence[str]) -> int | None:
    for name in names:
        value = found.get(name)
        try:
            number = float("nan") if value is None or isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            continue
        if 0 <= number <= _MOST_TOKENS:
            return math.ceil(number)
    return None


def _withheld(message: Mapping[str, Any], received: int | None) -> str:
    """Return what the model wrote if a message has no text; empty if that is nothing, or only the end token."""
    if "content" not in message:  # Gemini of a prompt that it blocked
        return "no text (`content` is missing)"
    if received is not None:
        return f"{received} tokens without text" if received > 1 else ""
    return "no text (`content` is missing or null)" if message.get("content") is None else ""
