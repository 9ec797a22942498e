"""The client with a real local server: requests, retries, errors, budgets, and secrecy of the key."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from pydantic import ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Example, Message
from stayaligned.core.settings import Endpoint
from stayaligned.evaluation.answers import complete_over_endpoint
from stayaligned.evaluation.endpoint.client import Failure, Reply, _retry_after, ask
from stayaligned.evaluation.endpoint.cost import Meter, Prices, Usage, estimate_usage
from support.server import Raw, chat_server, completion

KEY = "sk-of-nobody-1234"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def endpoint(url: str, **settings: Any) -> Endpoint:
    return Endpoint(base_url=url, model="m", **{"timeout_seconds": 5, "attempts": 3, "backoff_seconds": 0} | settings)


def says(*texts: str) -> list[tuple[Message, ...]]:
    return [(Message(role="user", content=text),) for text in texts]


def last(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def replies_of(
    url: str, *texts: str, settings: dict[str, Any] | None = None, **more: Any
) -> dict[int, Reply | Failure]:
    found = list(ask(endpoint(url, **(settings or {})), says(*texts), **{"max_tokens": 9} | more))
    assert len({index for index, _ in found}) == len(found)
    return dict(found)


# ---- what is sent and read -----------------------------------------------------------------------------------------


def test_a_request_contains_only_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    turns = (Message(role="system", content="s"), Message(role="user", content="u\ud800\u202e"))
    with chat_server(lambda _: "yes") as server:
        target = endpoint(server.url + "/", api_key_env="MY_KEY", limit_field="max_completion_tokens")
        list(ask(target, [turns], max_tokens=7, temperature=None, seed=3))
        list(ask(endpoint(server.url), [turns], max_tokens=7))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u\ud800\u202e"}]
    common = {"model": "m", "messages": messages, "stream": False}
    assert server.bodies[0] == {**common, "max_completion_tokens": 7, "seed": 3}
    assert server.bodies[1] == {**common, "max_tokens": 7, "temperature": 0.0}
    assert server.paths == ["/v1/chat/completions"] * 2
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "authorization" not in server.headers[1]


def test_each_conversation_gets_its_own_reply_once() -> None:
    def answer(body: dict[str, Any]) -> str:
        time.sleep(0.02 * (int(last(body)) % 3))
        return f"re {last(body)}"

    with chat_server(answer) as server:
        found = list(ask(endpoint(server.url, concurrency=4), says(*map(str, range(20))), max_tokens=9))
    assert {index: reply.text for index, reply in found} == {i: f"re {i}" for i in range(20)}
    assert len(found) == 20
    assert [index for index, _ in found] != list(range(20)), (
        "replies came in order of the requests instead of completion"
    )
    assert list(ask(endpoint(server.url), [], max_tokens=9)) == []


def test_the_token_limit_a_refusal_and_the_servers_count_are_read() -> None:
    replies = {
        "cut": completion("half", "length"),
        "refused": completion(None, refusal="no"),
        "empty": completion(None),
        "counted": {**completion("x"), "usage": {"prompt_tokens": 5, "completion_tokens": 2}},
    }
    with chat_server(lambda body: replies[last(body)]) as server:
        found = replies_of(server.url, *replies)
    assert [(found[i].text, found[i].finished) for i in range(4)] == [
        ("half", False),
        ("no", True),
        ("", True),
        ("x", True),
    ]
    assert found[3].usage == Usage(5, 2)
    assert found[0].usage == estimate_usage(["cut"], 9) == Usage(5, 9)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[1]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b'{"choices": [{"message": {"content": "a", "content": "b"}}]}',
        b'{"choices": [{"message": {"content": "\xff"}}]}',
        b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_body_that_is_not_a_chat_completion_is_unreadable_after_all_attempts(body: bytes) -> None:
    with chat_server(lambda b: Raw(body=body) if last(b) == "odd" else "fine") as server:
        found = replies_of(server.url, "even", "odd")
    assert found[0] == Reply("fine", finished=True, usage=estimate_usage(["even"], 9))
    assert (found[1].kind, found[1].requests) == ("unreadable", 3)
    assert "not a chat completion" in found[1].reason


def test_a_reply_that_fails_the_check_is_requested_again() -> None:
    counts = itertools.count()
    with chat_server(lambda _: "good" if next(counts) == 2 else "bad") as server:
        found = replies_of(server.url, "x", check=lambda reply: "" if reply.text == "good" else "it was bad")
        assert (found[0].text, found[0].requests) == ("good", 3)
        found = replies_of(server.url, "x", check=lambda reply: "" if reply.text == "good" else "it was bad")
    assert found[0] == Failure("unreadable", "it was bad", 3)


# ---- when it stops at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, b'{"error": {"message": "bad key sk-of-nobody-1234 \x1b[2J"}}', "was refused"),
        (403, b'{"detail": "sk-of-nobody-1234 not allowed"}', "was refused"),
        (404, b'{"error": "the model m does not exist"}', "a model of this server"),
        (402, b"no", "Add credit to the account"),
        (429, b'{"error": {"code": "insufficient_quota", "message": "quota"}}', "Add credit to the account"),
        (307, b"", "base_url"),
    ],
)
def test_permanent_errors_end_after_one_request_and_never_show_the_key(
    status: int, body: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_server(lambda _: "stolen") as elsewhere:
        headers = {"Location": f"{elsewhere.url}/chat/completions"}
        with chat_server(lambda _: Raw(status, body.replace(b"\x1b", b"\\u001b"), headers)) as server:
            with pytest.raises(StayalignedError) as caught:
                replies_of(server.url, *"abcdefgh", settings={"concurrency": 1})
            assert len(server.bodies) == 1
        assert elsewhere.bodies == []
    shown = str(caught.value) + repr(caught.value) + repr(caught.value.__cause__)
    assert words in shown
    assert str(status) in shown
    assert KEY not in shown
    assert "\x1b" not in shown


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(lambda _: Raw(401)) as server, pytest.raises(StayalignedError, match=r"NO_SUCH_KEY is not set"):
        replies_of(server.url, "x", settings={"api_key_env": "NO_SUCH_KEY"})
    monkeypatch.setenv("NO_SUCH_KEY", "a\nb")
    with pytest.raises(StayalignedError, match=r"the key in NO_SUCH_KEY contains characters") as caught:
        replies_of(server.url, "x", settings={"api_key_env": "NO_SUCH_KEY"})
    assert "a\nb" not in str(caught.value)


def test_an_unreachable_server_is_reported_soon() -> None:
    with chat_server(lambda _: "x") as server:
        pass
    started = time.monotonic()
    with pytest.raises(StayalignedError, match="failed 3 requests in a row"):
        replies_of(server.url, *"abcdefgh")
    with pytest.raises(StayalignedError, match="failed 1 requests in a row, the last one 3 times"):
        replies_of(server.url, "a")
    assert time.monotonic() - started < 5


def test_a_server_that_stops_ends_the_requests_after_yielding_all_replies() -> None:
    found: list[int] = []
    with chat_server(lambda _: "x") as server:
        asking = ask(endpoint(server.url, concurrency=2, attempts=2), says(*map(str, range(100))), max_tokens=9)
        found += [next(asking)[0] for _ in range(20)]
        server.close()
        failed = 0
        with pytest.raises(
            StayalignedError, match=r"failed 10 requests in a row.*\n.*Rerun when the server is up"
        ) as caught:
            for _, answer in asking:
                failed += isinstance(answer, Failure)
    assert "connection" in str(caught.value).lower()
    assert failed < 10
    assert len(found) == 20


def test_failures_with_a_reply_between_them_are_not_consecutive() -> None:
    with chat_server(lambda b: Raw(500) if int(last(b)) % 10 else "x") as server:
        found = replies_of(server.url, *map(str, range(40)), settings={"concurrency": 1, "attempts": 1})
    assert [isinstance(found[i], Failure) for i in range(40)] == [i % 10 > 0 for i in range(40)]


def test_a_server_that_rejects_everything_ends_the_requests_but_one_rejected_request_does_not() -> None:
    with chat_server(lambda _: Raw(400, b'{"error": {"message": "unknown field seed"}}')) as server:
        with pytest.raises(StayalignedError, match=r"failed 10 requests in a row.*unknown field seed"):
            replies_of(server.url, *map(str, range(40)), settings={"concurrency": 1})
        assert len(server.bodies) == 10, "a rejected request was repeated"
    with chat_server(lambda b: Raw(400, b"too long") if int(last(b)) else "x") as server:
        found = replies_of(server.url, *map(str, range(40)), settings={"concurrency": 1})
    assert found[39] == Failure("rejected", "400: too long", 1)
    assert len(found) == 40
    with chat_server(lambda _: completion("half", "content_filter")) as server:
        found = replies_of(server.url, *map(str, range(12)))
    assert {(f.kind, f.requests) for f in found.values()} == {("rejected", 1)}
    filtered = b'{"error": {"code": "content_filter", "message": "filtered"}}'
    with chat_server(lambda _: Raw(400, filtered)) as server:
        assert len(replies_of(server.url, *map(str, range(40)))) == 40


# ---- waiting -------------------------------------------------------------------------------------------------------


def test_retry_after_is_obeyed_as_seconds_and_as_a_date() -> None:
    times: dict[str, list[float]] = {"0.3": [], "date": []}

    def answer(body: dict[str, Any]) -> Any:
        times[last(body)].append(time.time())
        if len(times[last(body)]) > 1:
            return "x"
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        return Raw(
            503 if last(body) == "date" else 429, headers={"Retry-After": "0.3" if last(body) != "date" else date}
        )

    with chat_server(answer) as server:
        found = replies_of(server.url, *times)
    assert [found[i].requests for i in (0, 1)] == [2, 2]
    assert times["0.3"][1] - times["0.3"][0] >= 0.3
    assert times["date"][1] - times["date"][0] >= 0.9  # an HTTP date has whole seconds
    assert [_retry_after(value, 0.0) for value in ("", "soon", "-5", "nan", "inf")] == [0, 0, 0, 0, float("inf")]


def test_a_wait_beyond_patience_seconds_ends_the_requests() -> None:
    with chat_server(lambda _: Raw(429, headers={"Retry-After": "3600"})) as server:
        with pytest.raises(StayalignedError, match=r"asks to wait 3600 s, more than patience_seconds 10"):
            replies_of(server.url, *"abc", settings={"patience_seconds": 10, "concurrency": 1})
        assert len(server.bodies) == 1


def test_waits_grow_and_stay_below_patience() -> None:
    times: list[float] = []

    def answer(_: dict[str, Any]) -> Raw:
        times.append(time.monotonic())
        return Raw(500)

    with chat_server(answer) as server:
        settings = {"attempts": 8, "backoff_seconds": 0.05, "patience_seconds": 0.1}
        (found,) = replies_of(server.url, "x", settings=settings).values()
    assert (found.kind, found.requests) == ("no reply", 8)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert 0.05 < sum(gaps) < 7 * 0.1 + 2


def drips() -> Iterator[bytes]:
    for _ in range(100):
        yield b" "
        time.sleep(0.1)


@pytest.mark.parametrize("pieces", [lambda: iter(time.sleep(3) or b"" for _ in "x"), drips], ids=["silent", "dripping"])
def test_the_timeout_applies_to_the_whole_reply(pieces: Any) -> None:
    with chat_server(lambda b: Raw(pieces=pieces) if last(b) == "slow" else "x") as server:
        started = time.monotonic()
        found = replies_of(server.url, "quick", "slow", settings={"timeout_seconds": 0.4, "attempts": 2})
        assert time.monotonic() - started < 2.5
    assert found[0].text == "x"
    assert (found[1].kind, found[1].requests) == ("no reply", 2)


def test_an_endless_reply_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stayaligned.evaluation.endpoint.client._MAX_REPLY_BYTES", 1 << 16)
    with chat_server(lambda _: Raw(pieces=lambda: itertools.repeat(b" " * 4096))) as server:
        found = replies_of(server.url, "x")
    assert (found[0].kind, found[0].requests) == ("unreadable", 3)


def test_at_most_concurrency_requests_are_ahead_of_the_caller_and_closing_stops_them() -> None:
    with chat_server(lambda _: "x") as server:
        asking = ask(endpoint(server.url, concurrency=4), says(*map(str, range(100))), max_tokens=9)
        for taken in range(1, 6):
            next(asking)
            time.sleep(0.1)
            assert len(server.bodies) <= taken - 1 + 4
        assert sum(t.name.endswith("(worker)") for t in threading.enumerate()) == 4
        asking.close()  # type: ignore[attr-defined]
        time.sleep(0.2)
        assert len(server.bodies) <= 8
        assert sum(t.name.endswith("(worker)") for t in threading.enumerate()) == 0


def test_an_interrupted_command_ends_without_waiting_for_the_server() -> None:
    program = """
import sys
from stayaligned.core.settings import Endpoint
from stayaligned.evaluation.endpoint.client import ask
from stayaligned.core.records import Message
turns = [Message(role="user", content="x")]
asking = ask(Endpoint(base_url=sys.argv[1], model="m", timeout_seconds=60), [turns], max_tokens=1)
next(asking)
"""
    arrived, ended = threading.Event(), threading.Event()

    def answer(_: dict[str, Any]) -> str:
        arrived.set()
        ended.wait(60)  # the server replies only after the command has ended
        return "x"

    with chat_server(answer) as server:
        process = subprocess.Popen([sys.executable, "-c", program, server.url], stderr=subprocess.PIPE)
        try:
            assert arrived.wait(60)
            process.send_signal(2)
            _, stderr = process.communicate(timeout=50)
        finally:
            ended.set()
    assert b"KeyboardInterrupt" in stderr


# ---- the budget ----------------------------------------------------------------------------------------------------


def test_the_request_budget_holds_under_concurrency_and_all_replies_are_yielded() -> None:
    with chat_server(lambda _: "x") as server:
        found = []
        with pytest.raises(StayalignedError, match=r"the budget is used up \(budget_requests 10\): 10 requests"):
            for index, _ in ask(
                endpoint(server.url, concurrency=6),
                says(*map(str, range(40))),
                max_tokens=9,
                meter=Meter(budget_requests=10),
            ):
                found.append(index)
        assert len(server.bodies) == len(set(found)) == 10


def test_dollars_are_counted_from_the_servers_usage_and_stay_within_the_budget() -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    prices = Prices(input=1000, output=10_000)  # 0.2 dollars a request
    with chat_server(lambda _: {**completion("x"), "usage": usage}) as server:
        meter = Meter(prices=prices, budget_dollars=2.05)
        with pytest.raises(StayalignedError, match=r"budget_dollars 2\.05"):
            list(ask(endpoint(server.url, concurrency=6), says(*"abcdefghijklmnop"), max_tokens=10, meter=meter))
    assert meter.used == Usage(100 * meter.requests, 10 * meter.requests)
    assert meter.dollars == pytest.approx(0.2 * meter.requests)
    assert 2.05 - 2 * 0.2 < meter.dollars <= 2.05


def test_an_attempt_counts_exactly_if_it_may_be_billed() -> None:
    with chat_server(lambda b: Raw(body=b"{") if last(b) == "odd" else Raw(500)) as server:
        meter = Meter()
        replies_of(server.url, "odd", meter=meter)
        assert (meter.requests, meter.used.tokens) == (3, 3 * estimate_usage(["odd"], 9).tokens)
        meter = Meter()
        replies_of(server.url, "even", meter=meter)
        assert (meter.requests, meter.used.tokens) == (3, 0)


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x", "https://me:pw@x/v1", "https://x/v1?key=1", "https://x/#a", "https://"]
)
def test_an_address_that_is_invalid_or_contains_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="must"):
        Endpoint(base_url=url, model="m")


def test_no_hub_token_is_sent_and_offline_mode_has_no_effect(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("hf_of_nobody")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with chat_server(lambda _: "x") as server:
        assert replies_of(server.url, "a")[0].text == "x"
    assert "hf_of_nobody" not in json.dumps(server.headers)


def test_importing_the_client_imports_nothing_heavy() -> None:
    program = "import sys, stayaligned.evaluation.endpoint.client\n"
    program += "assert not {'torch', 'httpx2', 'tenacity', 'openai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- generating ----------------------------------------------------------------------------------------------------


def test_a_served_model_gives_completions_like_those_of_a_local_model() -> None:
    examples = [
        Example(id=f"e{i}", prompt=says(f"q{i}")[0], completion=f"r{i}", category="c", origin="harmful")
        for i in range(5)
    ]
    with chat_server(lambda b: completion(last(b), "length" if last(b) == "q3" else "stop")) as server:
        found = dict(complete_over_endpoint(endpoint(server.url), examples, "harmful", max_tokens=6, seed=1))
    assert all(body["max_tokens"] == 6 and body["temperature"] == 0 and body["seed"] == 1 for body in server.bodies)
    assert [found[i].text for i in range(5)] == [f"q{i}" for i in range(5)]
    assert [found[i].finished for i in range(5)] == [True, True, True, False, True]
    assert {(c.id, c.prompt, c.prompt_set, c.reference, c.category) for c in found.values()} == {
        (e.id, e.prompt, "harmful", e.completion, "c") for e in examples
    }


def test_a_prompt_without_a_completion_is_an_error_after_the_others_were_yielded() -> None:
    examples = [Example(id=f"e{i}", prompt=says(f"q{i}")[0]) for i in range(5)]
    with chat_server(lambda b: Raw(400, b"no") if last(b) in {"q1", "q4"} else "x") as server:
        found = []
        with pytest.raises(
            StayalignedError, match=r"did not answer 2 of 5 harmful prompts; 'e1': 400: no\nHint: .*rerun"
        ):
            found.extend(
                index
                for index, _ in complete_over_endpoint(
                    endpoint(server.url, concurrency=1), examples, "harmful", max_tokens=6
                )
            )
