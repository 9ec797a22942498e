"""Chat completions of any server that speaks OpenAI's HTTP interface: many at once, retried, bounded, hostile.

`httpx2` speaks HTTP and `tenacity` repeats. huggingface_hub's InferenceClient was tried first, and is unfit here: with
no key given it sends the user's hub token to whatever server is named; with HF_HUB_OFFLINE set it refuses a server on
this machine; and its time-out holds for each piece of an answer, not for the answer. Imports neither at its own import.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Message
from stayaligned.core.settings import Endpoint
from stayaligned.core.text import visible
from stayaligned.evaluation.endpoint.cost import Meter, Usage, estimated

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

_RETRIED = frozenset({408, 409, 425, 429})
"""And all from 500 up."""
_GIVE_UP_AFTER = 10
"""Requests in a row that failed after all their attempts, from which the server counts as gone."""
_NEVER_MET = 3
"""The same of connections, while there has been none: an address that is wrong should be said soon."""
_LARGEST_ANSWER = 16 << 20
"""Bytes. A chat completion takes a few thousand."""
_QUOTED = 300
"""Characters of a server's own words that a message repeats."""


FailureKind = Literal["no connection", "no answer", "rejected", "unreadable"]
"""No answer: a time-out, a connection closed on the way, 429, 5xx. Rejected: the server will not have this request."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model answered."""

    text: str
    finished: bool
    """False where it was cut at the token limit."""
    usage: Usage
    """As the server reports it; our estimate where it does not."""
    requests: int = 1
    """Attempts it took."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no usable answer, after all attempts."""

    kind: FailureKind
    reason: str
    requests: int = 1


def usable(_reply: Reply) -> str:
    """Accepts every reply: no complaint."""
    return ""


def ask(
    endpoint: Endpoint,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    temperature: float | None = 0.0,
    seed: int | None = None,
    response_format: Mapping[str, Any] | None = None,
    complaint: Callable[[Reply], str] = usable,
    meter: Meter | None = None,
) -> Iterator[tuple[int, Reply | Failure]]:
    """Each conversation's index with its reply or failure, as they come, each once.

    No more than `concurrency` conversations are asked and not yet taken by the caller: one that keeps each reply
    before it takes the next loses at most so many to a kill. Closing the iterator ends the asking.

    The key is read from the environment when asking starts, sent to `base_url` and nowhere else (no redirect is
    followed), and removed from everything that is shown.

    Args:
        endpoint: the server, the model, and how patiently to ask.
        conversations: each ends with the user's turn.
        max_tokens: after which the server cuts an answer.
        temperature: None sends none, for models that accept no other than their own.
        seed: sent if given; few servers promise to heed it.
        response_format: as in OpenAI's interface, for servers that know it.
        complaint: why a reply is of no use, or ""; such a conversation is asked again while attempts are left.
        meter: counts what is spent, and stops at its budget.

    Raises:
        StayalignedError: if the server refuses the key or the model, is gone, or the budget is used up.
    """
    options = {endpoint.limit_field: max_tokens, "temperature": temperature, "seed": seed}
    options |= {"response_format": response_format}
    sent = {"model": endpoint.model, "stream": False, **{k: v for k, v in options.items() if v is not None}}
    asking = _Asking(endpoint, sent, max_tokens, complaint, meter or Meter(), len(conversations))
    return asking.run(conversations)


class _AttemptError(Exception):
    """An attempt that may succeed when repeated."""

    def __init__(self, kind: FailureKind, reason: str, *, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.kind: FailureKind = kind
        self.wait = wait


class _RejectedError(Exception):
    """The server will not have this one request."""


class _StoppedError(Exception):
    """There is no more asking."""


class _BudgetError(Exception):
    """The meter admits no more."""


class _Asking:
    """One call of `ask`: its threads' common state."""

    def __init__(
        self,
        endpoint: Endpoint,
        sent: Mapping[str, Any],
        max_tokens: int,
        complaint: Callable[[Reply], str],
        meter: Meter,
        total: int,
    ) -> None:
        self._endpoint, self._sent, self._max_tokens = endpoint, sent, max_tokens
        self._complaint, self._meter, self._total = complaint, meter, total
        self._key = os.environ.get(endpoint.api_key_env, "").strip()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._answered = False
        self._failed_in_a_row = 0

    def run(self, conversations: Sequence[Sequence[Message]]) -> Generator[tuple[int, Reply | Failure]]:
        used_up = False
        with self._client() as client:

            def work(index: int) -> Reply | Failure | None:
                return self._converse(client, conversations[index])

            with closing(
                _as_they_come(work, len(conversations), self._endpoint.concurrency, self._stop, lambda: used_up)
            ) as found:
                for index, answer in found:
                    if answer is None:
                        used_up = True
                    else:
                        yield index, answer
        if used_up:
            raise self._meter.used_up()

    def _client(self) -> httpx2.Client:
        import httpx2

        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            if not (self._key.isascii() and self._key.isprintable()):
                raise StayalignedError(
                    f"the key in {self._endpoint.api_key_env} holds characters that no key has", hint="Set it anew."
                )
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx2.Limits(max_connections=self._endpoint.concurrency)
        return httpx2.Client(headers=headers, timeout=self._endpoint.timeout_seconds, limits=limits)

    def _converse(self, client: httpx2.Client, conversation: Sequence[Message]) -> Reply | Failure | None:
        """One conversation through all its attempts; None where the budget ended it."""
        import tenacity

        messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
        # ASCII escapes, since an answer under judgment may hold a lone surrogate, which has no UTF-8.
        body = json.dumps({**self._sent, "messages": messages}).encode("ascii")
        estimate = estimated((turn.content for turn in conversation), self._max_tokens)
        longest = self._endpoint.patience_seconds
        backoff = tenacity.wait_random_exponential(multiplier=self._endpoint.backoff_seconds, max=longest)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            return backoff(state) + (error.wait if isinstance(error, _AttemptError) else 0.0)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._endpoint.attempts),
            retry=tenacity.retry_if_exception_type(_AttemptError),
            wait=pause,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            reply = retrying(self._attempt, client, body, estimate)
        except _BudgetError:
            return None
        except (_AttemptError, _RejectedError) as error:
            kind = error.kind if isinstance(error, _AttemptError) else "rejected"
            return self._failed(Failure(kind, str(error), retrying.statistics["attempt_number"]))
        return replace(reply, requests=retrying.statistics["attempt_number"])

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _attempt(self, client: httpx2.Client, body: bytes, estimate: Usage) -> Reply:
        if self._stop.is_set():
            raise _StoppedError
        if not self._meter.admit(estimate):
            raise _BudgetError
        spent = estimate
        try:
            status, headers, content = self._post(client, body)
            if status != 200:
                spent = Usage(0, 0)
                raise self._refusal(status, headers, content)
            reply, filtered = self._read(content, estimate)
            spent = reply.usage
        except _AttemptError as error:
            spent = Usage(0, 0) if error.kind == "no connection" else spent
            raise
        finally:
            self._meter.settle(estimate, spent)
        with self._lock:
            self._answered, self._failed_in_a_row = True, 0
        if filtered:
            # Half an answer, or none, by the server's hand: not what the model says.
            raise _RejectedError("the server filtered the answer (content_filter)")
        problem = self._complaint(reply)
        if problem:
            raise _AttemptError("unreadable", problem)
        return reply

    def _post(self, client: httpx2.Client, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and the whole body, within the time-out and the size that an answer may have."""
        import httpx2

        ends = time.monotonic() + self._endpoint.timeout_seconds
        content = bytearray()
        try:
            with client.stream("POST", f"{self._endpoint.base_url}/chat/completions", content=body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > ends:
                        raise _AttemptError("no answer", f"no whole answer in {self._endpoint.timeout_seconds:g} s")
                    if len(content) > _LARGEST_ANSWER:
                        raise _AttemptError("unreadable", f"an answer above {_LARGEST_ANSWER >> 20} MiB")
                return response.status_code, response.headers, bytes(content)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            reason = self._shown(str(error)) or "the connection timed out"
            raise _AttemptError("no connection", reason) from None
        except httpx2.TimeoutException:
            raise _AttemptError("no answer", f"no answer in {self._endpoint.timeout_seconds:g} s") from None
        except httpx2.HTTPError as error:
            raise _AttemptError("no answer", f"{type(error).__name__}: {self._shown(str(error))}") from None

    def _read(self, content: bytes, estimate: Usage) -> tuple[Reply, bool]:
        """The reply, and whether the server's filter has cut it."""
        try:
            parsed = _Body.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise _AttemptError("unreadable", f"not a chat completion: {where or 'body'}: {first['msg']}") from None
        choice, usage = parsed.choices[0], parsed.usage
        reply = Reply(
            text=choice.message.content or choice.message.refusal or "",
            finished=choice.finish_reason != "length",
            usage=estimate if usage is None else Usage(usage.prompt_tokens, usage.completion_tokens),
        )
        return reply, choice.finish_reason == "content_filter"

    def _refusal(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        """What a status other than 200 means for this request, or for all."""
        endpoint = self._endpoint
        said = self._shown(_said(content)) or "nothing more"
        words = f"the server at {endpoint.base_url} answered {status}: {said}"
        with self._lock:
            answered = self._answered
        if status == 401 or (status == 403 and not answered):
            had = "was refused" if self._key else "is not set"
            return StayalignedError(words, hint=f"The key in the environment variable {endpoint.api_key_env} {had}.")
        if status == 404 or 300 <= status < 400:
            hint = f"Is {endpoint.model!r} a model of this server, and does `base_url` end as it should (often in /v1)?"
            return StayalignedError(words, hint=hint)
        if status == 402 or "insufficient_quota" in content.decode("utf-8", "replace"):
            return StayalignedError(words, hint="What was answered is kept; pay the server and rerun.")
        if status not in _RETRIED and status < 500:
            return _RejectedError(f"{status}: {said}")
        wait = _retry_after(headers.get("retry-after", ""), time.time())
        if wait > endpoint.patience_seconds:
            return StayalignedError(
                f"{words}; it asks to wait {wait:.0f} s, more than patience_seconds {endpoint.patience_seconds:g}",
                hint="What was answered is kept: rerun later, or with more patience.",
            )
        return _AttemptError("no answer", f"{status}: {said}", wait=wait)

    def _failed(self, failure: Failure) -> Failure:
        """The failure, or the end of it all if too many came in a row."""
        with self._lock:
            # What is wrong with one request is no sign of what is wrong with the server, once that has answered.
            its_own = failure.kind in {"rejected", "unreadable"} and self._answered
            if its_own or "content_filter" in failure.reason:
                return failure
            self._failed_in_a_row += 1
            unmet = failure.kind == "no connection" and not self._answered
            if self._failed_in_a_row < (min(_NEVER_MET, self._total) if unmet else _GIVE_UP_AFTER):
                return failure
            times = self._failed_in_a_row
        raise StayalignedError(
            f"the server at {self._endpoint.base_url} failed {times} requests in a row, the last one "
            f"{failure.requests} times: {failure.reason}",
            hint="What was answered is kept: rerun when it is up to continue. If it never answered, check `base_url`.",
        )

    def _shown(self, text: str) -> str:
        """A server's own words, cut, without the key and without what could drive a terminal."""
        text = text.replace(self._key, "[key]") if self._key else text
        return visible(" ".join(text[:_QUOTED].split()))


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Said(_Part):
    content: str | None = None
    refusal: str | None = None


class _Choice(_Part):
    message: _Said
    finish_reason: str | None = None


class _Usage(_Part):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(default=0, ge=0)


class _Body(_Part):
    """The part of a chat completion that is read."""

    choices: tuple[_Choice, ...] = Field(min_length=1)
    usage: _Usage | None = None


def _said(content: bytes) -> str:
    """The message in an error's body, whichever of the usual shapes it has."""
    text = content[: 4 * _QUOTED].decode("utf-8", "replace")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return text
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        found = [str(error[key]) for key in ("message", "detail", "code") if isinstance(error.get(key), str)]
        return " ".join(found) or text
    return error if isinstance(error, str) else text


def _retry_after(value: str, now: float) -> float:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; 0 if it says neither."""
    from email.utils import parsedate_to_datetime

    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if seconds == seconds else 0.0


def _as_they_come(
    work: Callable[[int], T], total: int, threads: int, stop: threading.Event, ended: Callable[[], bool]
) -> Generator[tuple[int, T]]:
    """`work` of 0 … total-1 in threads; no more than `threads` are begun and not yet taken.

    The threads are daemons, which concurrent.futures has none of: an interrupted command must not wait a minute for
    a server that does not answer.
    """
    waiting: SimpleQueue[int | None] = SimpleQueue()
    done: SimpleQueue[tuple[int, T | BaseException]] = SimpleQueue()

    def labor() -> None:
        while (index := waiting.get()) is not None:
            try:
                done.put((index, work(index)))
            except BaseException as error:
                done.put((index, error))

    threads = min(threads, total)
    for _ in range(threads):
        threading.Thread(target=labor, daemon=True).start()
    rest = iter(range(total))
    under_way = 0
    try:
        for index in islice(rest, threads):
            waiting.put(index)
            under_way += 1
        while under_way:
            index, result = done.get()
            under_way -= 1
            if isinstance(result, BaseException):
                raise result
            yield index, result
            if not ended() and (following := next(rest, None)) is not None:
                waiting.put(following)
                under_way += 1
    finally:
        stop.set()
        for _ in range(threads):
            waiting.put(None)
